"""The likeliest token of each row of logits. Imports: kernels.{dispatch,pdl}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.greedy.triton_kernel:greedy",
    "reference": "baleen.kernels.greedy.reference:greedy",
}

_greedy = Op(IMPLEMENTATIONS)


def greedy(logits: Tensor) -> Tensor:
    """The lowest index of the largest value of each row; -1 for rows that hold NaN or +inf, or nothing but -inf.

    logits   [R, V] float32, V > 0; R may be 0
    returns  [R] int64
    Error:   none.     Cost: reads the logits once.
    """
    ids: Tensor = _greedy(logits)
    return ids
