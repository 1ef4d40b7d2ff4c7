"""Inputs of the FP8 linear layers: partial blocks on both sides, one row, bf16 activations."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _linear(m: int, n: int, k: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    weight = torch.randn(n, k, generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-12, -6, (-(-n // 128), -(-k // 128)), generator=g).float())
    return torch.randn(m, k, generator=g).to(dtype), weight, scale


# Rounding of float32 sums of up to 576 products of size 10.
CASES = [
    Case("fp8_gemm", _linear, (m, n, k, dtype), rtol=0.0 if dtype == torch.float32 else 2**-8, atol=2e-4)
    for m, n, k in ((1, 128, 128), (3, 192, 64), (5, 576, 300), (2, 40, 576), (9, 192, 512))
    for dtype in (torch.float32, torch.bfloat16)
]
