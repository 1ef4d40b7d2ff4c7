"""Inputs of the FP8 linear layers: partial blocks on both sides, one row, more rows than a tile, both dtypes."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.fp8_quant import Quantized, empty_scale
from baleen.kernels.fp8_quant.reference import quantize_1x128
from baleen.kernels.testing import Case


def _linear(m: int, n: int, k: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Results of about 1 to 5: blocks of x and of the weight differ by a factor of 16 at most."""
    weight = torch.randn(n, k, generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-2, 2, (-(-n // 128), -(-k // 128)), generator=g).float()) / (100 * k**0.5)
    x = torch.randn(m, k, generator=g) * torch.exp2(torch.randint(-2, 2, (m, 1), generator=g).float())
    values, row_major = quantize_1x128(x)
    column_major = empty_scale(m, row_major.shape[1], row_major.device)
    return Quantized(values, column_major.copy_(row_major)), weight, scale, dtype


# Wide enough for Hopper's tensor cores, which keep about 14 bits inside a block of 128, and for a result rounded to
# bfloat16 on the way; a block left out or scaled by its neighbour's scale shows as 0.1 and more.
CASES = [
    Case("fp8_gemm", _linear, (m, n, k, dtype), rtol=2**-7, atol=2e-2)
    for m, n, k in (
        *((1, 128, 128), (3, 192, 64), (5, 576, 300), (2, 40, 576), (9, 192, 512), (16, 576, 1024)),
        *((1, 2240, 1024), (40, 300, 256), (64, 128, 1536), (100, 256, 384), (144, 256, 512)),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
