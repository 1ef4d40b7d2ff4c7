"""The experts' products: one weight per run of rows, and SwiGLU between them. Imports: kernels.dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {"reference": "baleen.kernels.grouped_gemm.reference:grouped_gemm"}

_grouped_gemm = Op(IMPLEMENTATIONS)
_silu_and_mul = Op(IMPLEMENTATIONS, "silu_and_mul")


def grouped_gemm(x: Tensor, weight: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """Row i of x times the weight of its expert, transposed.

    x        [M, K] float32 or bfloat16, rows sorted by expert
    weight   [E, N, K] x.dtype
    counts   E ints: rows of expert 0, 1, ...; 0 is fine; their sum is M. A list saves a transfer where x is on a GPU
    returns  [M, N] x.dtype
    Error:   rounding.     Cost: reads the weights of experts that have rows, once.
    Raises:  ValueError if counts does not have E entries that sum to M.
    """
    return _grouped_gemm(x, weight, counts)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, the middle of a SwiGLU expert.

    x        [M, 2N] float32 or bfloat16: gate in the first N columns, up in the last N (any number of leading dims)
    returns  [M, N] x.dtype, computed in float32
    Error:   rounding.     Cost: reads x, writes half of it.
    """
    return _silu_and_mul(x)
