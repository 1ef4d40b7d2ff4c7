"""The LM head and the likeliest token of each row, at once. Imports: kernels.{bf16_gemm,dispatch,greedy,pdl}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.lm_head.triton_kernel:lm_head",
    "reference": "baleen.kernels.lm_head.reference:lm_head",
}

_lm_head = Op(IMPLEMENTATIONS)


def lm_head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """bf16_gemm(hidden, weight), and greedy of that.

    hidden   [R, K] bfloat16, or float32, which a CPU serves with; R may be 0
    weight   [V, K] of hidden's dtype, V > 0
    returns  logits [R, V] float32
             ids [R] int64: the lowest index of a row's largest logit; -1 for rows that hold NaN or +inf, or nothing but
             -inf
    Error:   of the logits as of bf16_gemm; of the ids none: they are those of these logits.
    Cost:    as of bf16_gemm, and scratch of 4*R bytes for each tile of the weight. Of up to 128 rows a GPU reads no
             logits again, but for a tile of each row.
    """
    result: tuple[Tensor, Tensor] = _lm_head(hidden, weight)
    return result
