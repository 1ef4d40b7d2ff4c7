"""Linear layers of FP8 checkpoints: activations 1x128, weights 128x128. Imports: kernels.{dispatch,fp8_quant,pdl}."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.dispatch import Op
from baleen.kernels.fp8_quant import Quantized

IMPLEMENTATIONS = {
    "tuned": "baleen.kernels.fp8_gemm.tuned:fp8_gemm",
    "triton": "baleen.kernels.fp8_gemm.triton_kernel:fp8_gemm",
    "deep_gemm": "baleen.kernels.fp8_gemm.deep_gemm:fp8_gemm",
    "scaled_mm": "baleen.kernels.fp8_gemm.scaled_mm:fp8_gemm",
    "reference": "baleen.kernels.fp8_gemm.reference:fp8_gemm",
}

_fp8_gemm = Op(IMPLEMENTATIONS)
_fp8_linear_dequantized = Op(IMPLEMENTATIONS, "fp8_linear_dequantized")


def fp8_gemm(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight^T of FP8 rows: y[m,n] = sum over blocks b of sx[m,b] * sw[n/128,b] * (x8 . w8 in block b).

    x                 values float8_e4m3fn [M, K], scale float32 [M, ceil(K/128)] of any strides; on a GPU those of
                      `fp8_quant.empty_scale` are read without a copy
    weight            float8_e4m3fn [N, K]
    weight_scale_inv  float32 [ceil(N/128), ceil(K/128)]
    returns           [M, N] dtype, float32 or bfloat16; float32 accumulation within and between blocks
    Error:            rounding; on Hopper sums in a block keep about 14 bits, and results are rounded to bfloat16 first.
    Cost:             2*M*N*K flops; scratch: on a CPU 32 MiB for the weight, on a GPU up to 4*M*N bytes for each of the
                      parts that K is split into when rows are few.
    Raises:           ValueError if the scale's shape does not fit.
    Source:           DeepSeek-V3 report, section 3.3.2.
    """
    return _fp8_gemm(x, weight, weight_scale_inv, dtype)


def fp8_linear_dequantized(x: Tensor, weight: Tensor) -> Tensor:
    """The same numbers for a weight that was dequantised once at load: faster where FP8 has no hardware.

    x        [M, K] float32 or bfloat16 (any number of leading dims)
    weight   float32 or bfloat16 [N, K], dequantize_128x128 of the checkpoint's (bfloat16 holds it if the scales are
             powers of two)
    returns  [M, N] x.dtype
    Error:   rounding against fp8_gemm.     Cost: 2*M*N*K flops and the rounding of x.
    """
    return _fp8_linear_dequantized(x, weight)
