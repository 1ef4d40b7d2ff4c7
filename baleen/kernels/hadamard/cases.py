"""Inputs of hadamard."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _vectors(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(shape, generator=g).to(dtype),)


CASES = [
    Case("hadamard", _vectors, (shape, dtype), rtol=0.0 if dtype == torch.float32 else 2**-8, atol=3e-6)
    for shape in ((1, 1), (3, 2), (2, 3, 16), (4, 5, 128), (0, 128), (2, 512))
    for dtype in (torch.float32, torch.bfloat16)
]
