"""FP8 linear layers by DeepGEMM (package sgl-deep-gemm): compiled per shape at its first use, then cached on disk.

It takes the activations' scales as they lie if they lie as `empty_scale` makes them, and else transposes them first.
On Hopper the sums inside a block of 128 keep about 14 bits; between blocks they are float32; results are bfloat16.
"""

from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.fp8_gemm import reference
from baleen.kernels.fp8_quant import Quantized

deep_gemm.set_pdl(True)  # see kernels/pdl.py: all its kernels wait before they read or write


def takes(num_tokens: int, num_rows: int, num_cols: int) -> bool:
    """True for the shapes it multiplies, of x [num_tokens, num_cols] and weight [num_rows, num_cols]."""
    return num_cols % 128 == 0 and num_rows % 64 == 0


def fp8_gemm(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    if not _on_gpu(x.values) or x.values.dim() != 2 or not takes(x.values.shape[0], *weight.shape):
        return reference.fp8_gemm(x, weight, weight_scale_inv, dtype)
    out = torch.empty(x.values.shape[0], weight.shape[0], dtype=torch.bfloat16, device=x.values.device)
    if out.numel():
        deep_gemm.fp8_gemm_nt((x.values, x.scale), (weight, weight_scale_inv), out)
    return out.to(dtype)


def _on_gpu(values: Tensor) -> bool:
    return values.is_cuda
