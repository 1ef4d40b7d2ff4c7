"""FP8 linear layers in torch: both operands dequantised (exactly, for power-of-two scales), then fp32 matmuls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import BLOCK, dequantize_1x128, dequantize_128x128, round_1x128

SCRATCH_BYTES = 32 << 20


def fp8_gemm(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    rows = dequantize_1x128(x.values, x.scale)
    num_rows, num_cols = weight.shape
    out = torch.empty(*rows.shape[:-1], num_rows, dtype=dtype, device=rows.device)
    # Whole row blocks of the weight, so that each chunk has its own rows of scales.
    step = max(SCRATCH_BYTES // (4 * num_cols * BLOCK), 1) * BLOCK
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        scales = weight_scale_inv[start // BLOCK : -(-stop // BLOCK)]
        out[..., start:stop] = F.linear(rows, dequantize_128x128(weight[start:stop], scales))
    return out


def fp8_linear_dequantized(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(round_1x128(x).to(weight.dtype), weight).to(x.dtype)
