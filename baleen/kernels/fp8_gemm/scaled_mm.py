"""FP8 linear layers by torch's own block-wise product (cuBLAS 12.9 or newer, Hopper)."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.fp8_gemm import reference
from baleen.kernels.fp8_quant import quantize_1x128


def fp8_gemm(x: Tensor, weight: Tensor, weight_scale_inv: Tensor) -> Tensor:
    num_rows, num_cols = weight.shape
    # a weight's scales are taken as they lie only if a row of them is a multiple of 16 bytes
    if not x.is_cuda or num_cols % 512 or num_rows % 128 or not x.numel():
        return reference.fp8_gemm(x, weight, weight_scale_inv)
    values, scale = quantize_1x128(x.reshape(-1, num_cols))
    by_column = scale.t().contiguous().t()
    out = torch._scaled_mm(values, weight.t(), by_column, weight_scale_inv.t(), out_dtype=torch.bfloat16)
    return out.view(*x.shape[:-1], num_rows).to(x.dtype)
