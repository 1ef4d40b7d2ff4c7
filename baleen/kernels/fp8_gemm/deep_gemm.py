"""FP8 linear layers by DeepGEMM (package sgl-deep-gemm): compiled per shape at its first use, then cached on disk.

On Hopper the sums inside a block of 128 keep fewer bits than float32; between blocks they are float32.
"""

from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.fp8_gemm import reference
from baleen.kernels.fp8_quant import quantize_1x128


def fp8_gemm(x: Tensor, weight: Tensor, weight_scale_inv: Tensor) -> Tensor:
    num_rows, num_cols = weight.shape
    if not x.is_cuda or num_cols % 128 or num_rows % 64:
        return reference.fp8_gemm(x, weight, weight_scale_inv)
    out = torch.empty(*x.shape[:-1], num_rows, dtype=torch.bfloat16, device=x.device)
    if x.numel():
        values = quantize_1x128(x.reshape(-1, num_cols))
        deep_gemm.fp8_gemm_nt(values, (weight, weight_scale_inv), out.view(-1, num_rows))
    return out.to(x.dtype)
