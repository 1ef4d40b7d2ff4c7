"""Inputs of grouped_gemm and silu_and_mul: idle experts at the start, middle and end, one expert with all, no rows."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _grouped(counts: list[int], n: int, k: int, dtype: torch.dtype, kind: Any, g: torch.Generator) -> tuple[Any, ...]:
    """kind makes of the list what is passed as counts."""
    x, weight = torch.randn(sum(counts), k, generator=g), torch.randn(len(counts), n, k, generator=g)
    return x.to(dtype), weight.to(dtype), kind(counts)


def _gate_up(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(shape, generator=g).mul(4).to(dtype),)


# Rounding of float32 sums of up to 96 products.
CASES = [
    *(
        Case(
            "grouped_gemm",
            _grouped,
            (counts, n, k, dtype, kind),
            rtol=1e-6 if dtype == torch.float32 else 2**-7,
            atol=2e-5 if dtype == torch.float32 else 2e-2,
        )
        for counts, n, k in (
            ([3], 8, 16),
            ([0, 2, 0, 0, 5, 1, 0], 24, 40),
            ([0, 0, 9], 5, 7),
            ([0, 0], 4, 4),
            ([1] * 16, 32, 96),
            ([20, 30], 64, 33),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for kind in (list, torch.tensor)
    ),
    *(
        Case("silu_and_mul", _gate_up, (shape, dtype), rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=1e-30)
        for shape in ((1, 2), (5, 96), (2, 3, 8), (0, 4))
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
