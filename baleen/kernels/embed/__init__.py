"""Rows of the embedding table. Imports: kernels.{dispatch,pdl}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.embed.triton_kernel:embed",
    "reference": "baleen.kernels.embed.reference:embed",
}

_embed = Op(IMPLEMENTATIONS)


def embed(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids].

    weight   [V, D] float32 or bfloat16
    ids      [T] int64, 0 <= ids[t] < V
    returns  [T, D] of the weight's dtype
    Error:   none.     Cost: reads and writes T*D elements.
    """
    rows: Tensor = _embed(weight, ids)
    return rows
