"""Inputs of the two rotations: contiguous, slices of wider heads, no head dim, one token, bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.testing import Case


def _rotation(shape: tuple[int, ...], first: int, dim: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """x is columns first..first+dim of a tensor of this shape."""
    x = torch.randn(shape, generator=g).to(dtype)[..., first : first + dim]
    angles = torch.rand(shape[0], dim // 2, generator=g) * 1000
    cos: Tensor = angles.cos()
    return x, cos, angles.sin()


CASES = [
    Case(function, _rotation, (shape, first, dim, dtype), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)
    for function in ("rope_interleaved", "rope_half")
    for shape, first, dim in (
        ((1, 64), 0, 64),
        ((7, 64), 0, 64),
        ((5, 3, 192), 128, 64),
        ((5, 3, 128), 0, 64),
        ((2, 3, 4, 40), 7, 16),
        ((3, 2), 0, 2),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
