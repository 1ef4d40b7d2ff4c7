"""Inputs of rms_norm and add_rms_norm."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case

EPS = 1e-6


def _norm(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    x = torch.randn(rows, dim, generator=g) * 3
    # A row of zeros and one so small that eps decides.
    x[0] = 0
    if rows > 1:
        x[1] *= 1e-4
    return x.to(dtype), torch.randn(dim, generator=g).to(weight_dtype), EPS


def _add(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    x, weight, eps = _norm(rows, dim, dtype, weight_dtype, g)
    return x, torch.randn(rows, dim, generator=g).to(dtype), weight, eps


CASES = [
    Case(
        function,
        make,
        (rows, dim, dtype, weight_dtype),
        rtol=2e-6 if dtype == torch.float32 else 2**-8,
        atol=1e-6,
    )
    for function, make in (("rms_norm", _norm), ("add_rms_norm", _add))
    for rows, dim in ((1, 64), (5, 256), (33, 1536))
    for dtype in (torch.float32, torch.bfloat16)
    for weight_dtype in (torch.float32, torch.bfloat16)
]
