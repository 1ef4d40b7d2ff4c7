"""The experts' products: one weight per run of rows, and SwiGLU between them.

Imports: kernels.{dispatch,fp8_quant,pdl}.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from baleen.kernels.dispatch import Op
from baleen.kernels.fp8_quant import Quantized

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.grouped_gemm.triton_kernel:silu_and_mul",
    "reference": "baleen.kernels.grouped_gemm.reference:grouped_gemm",
}

_grouped_gemm = Op(IMPLEMENTATIONS, "grouped_gemm")
_silu_and_mul = Op(IMPLEMENTATIONS, "silu_and_mul")
_silu_and_mul_quant = Op(IMPLEMENTATIONS, "silu_and_mul_quant")


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

    x        [M, 2N] float32 or bfloat16: gate in the first N columns, up in the last N (any number of leading dims);
             rows may be strided
    returns  [M, N] x.dtype, computed in float32
    Error:   rounding.     Cost: reads x, writes half of it.
    """
    return _silu_and_mul(x)


def silu_and_mul_quant(x: Tensor) -> Quantized:
    """quantize_1x128(silu_and_mul(x)), rounded to x.dtype before.

    x        [M, 2N] as for silu_and_mul
    returns  values [M, N], scale [M, ceil(N/128)]
    Error:   rounding; then that of quantize_1x128.     Cost: reads x, writes a quarter of it (bfloat16).
    """
    return _silu_and_mul_quant(x)
