"""RMSNorm in torch, fp32 inside; then FP8 by the reference of fp8_quant."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import quantize_1x128


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    return rms_norm(total, weight, eps), total


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    return quantize_1x128(rms_norm(x, weight, eps))


def add_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Quantized, Tensor]:
    normed, total = add_rms_norm(x, residual, weight, eps)
    return normed, quantize_1x128(normed), total
