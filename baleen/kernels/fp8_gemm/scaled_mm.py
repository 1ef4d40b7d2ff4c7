"""FP8 linear layers by torch's own block-wise product (cuBLAS 12.9 or newer, Hopper). Results are bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.fp8_gemm import reference
from baleen.kernels.fp8_quant import Quantized


def takes(num_tokens: int, num_rows: int, num_cols: int) -> bool:
    """True for the shapes it multiplies, of x [num_tokens, num_cols] and weight [num_rows, num_cols].

    cuBLAS reads the scales without a stride of their own: a column of x's, and a row of the weight's, must be whole 16
    bytes. One and seven tokens it refuses, 128 and 2048 it takes.
    """
    return num_tokens % 16 == 0 and num_rows % 128 == 0 and num_cols % 512 == 0


def fp8_gemm(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    values, scale = x
    num_tokens = values.shape[0]
    if not _on_gpu(values) or values.dim() != 2 or not values.numel() or not takes(num_tokens, *weight.shape):
        return reference.fp8_gemm(x, weight, weight_scale_inv, dtype)
    if scale.stride() != (1, num_tokens):
        scale = scale.t().contiguous().t()
    return torch._scaled_mm(values, weight.t(), scale, weight_scale_inv.t(), out_dtype=torch.bfloat16).to(dtype)


def _on_gpu(values: Tensor) -> bool:
    return values.is_cuda
