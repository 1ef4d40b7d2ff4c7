"""Rows of logits: widths beside a chunk's, ties within a chunk and across, NaN and infinities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.testing import Case


def _normal(num_rows: int, width: int, g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(num_rows, width, generator=g),)


def _ties(num_rows: int, width: int, g: torch.Generator) -> tuple[Any, ...]:
    """Few different values, so that a row has its largest in many places; zeros of both signs are the largest."""
    return (-torch.randint(0, 3, (num_rows, width), generator=g).float(),)


def special(width: int) -> Tensor:
    """NaN or an infinity, alone or with all others, first, last or between: 7 rows that have no token, 2 that have."""
    rows = torch.linspace(-1, 1, width).repeat(9, 1)
    rows[0, 0] = torch.nan
    rows[1, -1] = torch.nan
    rows[2, width // 2] = torch.inf
    rows[3] = -torch.inf
    rows[4] = torch.nan
    rows[5, 1], rows[5, width // 2] = torch.inf, torch.nan
    rows[6] = torch.inf
    rows[7] = -torch.inf
    rows[7, width // 2] = -3.0e38
    rows[8, 1:] = -torch.inf
    return rows


def _special(width: int, g: torch.Generator) -> tuple[Any, ...]:
    return (special(width),)


def _strided(num_rows: int, width: int, g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(num_rows, width + 5, generator=g)[:, 3 : 3 + width],)


CASES = [
    *(Case("greedy", _normal, parameters) for parameters in ((1, 1), (3, 2048), (2, 2049), (0, 100), (17, 20000))),
    *(Case("greedy", _ties, parameters) for parameters in ((4, 5000), (20, 9000))),
    *(Case("greedy", _special, (width,)) for width in (3, 4200)),
    Case("greedy", _strided, (3, 2500)),
]
