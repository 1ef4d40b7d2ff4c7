"""Inputs of products with a float32 result: the shapes of gates, rows and columns that fill no tile or no 16 bytes,
rows inside a wider buffer, more rows than the kernel takes."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def product(t: int, n: int, k: int, beside: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Results of about 1. beside: columns of x's buffer that are not x's."""
    x = torch.randn(t, k + beside, generator=g).to(dtype)[:, beside:]
    return x, torch.randn(n, k, generator=g).div(k**0.5).to(dtype)


# Tensor cores cut off what they add, for about 3e-5 of a sum of 7168; a result that was rounded to bfloat16 on the way
# would be off by up to 2e-3 and more, a block left out by 0.1.
CASES = [
    Case("bf16_gemm", product, (*shape, dtype), atol=2e-4)
    for shape in (
        # tokens, rows of the weight, columns, columns beside
        (1, 32, 7168, 0),
        (16, 256, 7168, 0),
        (5, 64, 1000, 8),
        (33, 40, 264, 24),
        (100, 300, 512, 0),
        (128, 256, 896, 16),
        (3, 600, 7168, 0),
        (17, 24, 100, 0),
        (4, 24, 128, 4),
        (130, 64, 256, 0),
        (65, 600, 7168, 0),
        (0, 64, 256, 0),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
# A tile of the weight a program: for a CPU's loops too large.
GPU_CASES = [Case("bf16_gemm", product, (t, 40000, 512, 0, torch.bfloat16), atol=2e-4) for t in (1, 16, 20, 64, 128)]
