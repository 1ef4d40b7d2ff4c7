"""Tables and ids: rows narrower and wider than a program's share, repeated ids, no id."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _table(count: int, dim: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return torch.randn(50, dim, generator=g).to(dtype), torch.randint(0, 50, (count,), generator=g)


CASES = [
    Case("embed", _table, (count, dim, dtype))
    for count, dim in ((1, 512), (70, 24), (5, 2500), (0, 64))
    for dtype in (torch.float32, torch.bfloat16)
]
