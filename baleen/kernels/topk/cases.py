"""Inputs of topk: planted ties across the threshold, garbage past the lengths, short and empty rows, both zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.testing import Case


def _distinct(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=g)


def _ties(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Five values: every threshold ties."""
    return torch.randint(-2, 3, (rows, columns), generator=g).float()


def _relu_zeros(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Half zeros of either sign, as when every head's relu is off; the zeros tie whatever their sign."""
    logits = torch.randn(rows, columns, generator=g).relu()
    return torch.where(torch.rand(rows, columns, generator=g) < 0.5, -logits.clamp(max=0), logits)


def _equal(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.full((rows, columns), -1.5)


def _infinities(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Fewer finite scores than k: -inf is chosen too, by lowest position."""
    logits = torch.full((rows, columns), -torch.inf)
    logits[:, 1::7] = torch.randn(rows, len(range(1, columns, 7)), generator=g)
    logits[:, columns // 2 : columns // 2 + 1] = torch.inf
    return logits


def _nans(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(rows, columns, generator=g) < 0.7, torch.nan, torch.randn(rows, columns, generator=g))


def _rising(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Each score beats all before it: what is best so far never lasts."""
    return torch.randn(rows, columns, generator=g).sort(1).values


def _falling(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return -_rising(rows, columns, g)


def _comb(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Every 128th score is high: a sample at equal steps sees many of them, or none."""
    return torch.rand(rows, columns, generator=g) + (torch.arange(columns) % 128 == 0) * 2.0


def _hidden_rising(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """A sample of 1024 groups of 4 at equal steps of a row of 131,072 sees nothing, and what is best never lasts."""
    return _rising(rows, columns, g).masked_fill(torch.arange(columns) % 128 < 4, -torch.inf)


def _cluster(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """The best all lie side by side, their order in the last bits."""
    logits = torch.randn(rows, columns, generator=g)
    logits[:, columns // 3 : columns // 3 + 3000] = 8.0 + 1e-5 * torch.rand(rows, 3000, generator=g)
    return logits


def _magnitudes(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """All exponents of float32."""
    return torch.randn(rows, columns, generator=g) * torch.exp2(
        torch.randint(-120, 120, (rows, columns), generator=g).float()
    )


def _selection(kind: Any, rows: int, columns: int, k: int, full: bool, g: torch.Generator) -> tuple[Any, ...]:
    logits = kind(rows, columns, g)
    lengths = torch.randint(0, columns + 1, (rows,), generator=g)
    if full:
        lengths[:] = columns
    elif rows > 3:
        lengths[:4] = torch.tensor([0, min(k, columns), min(k + 1, columns), max(min(k, columns) - 1, 0)])
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])
    past = torch.arange(columns) >= lengths[:, None]
    noise = garbage[torch.randint(0, 4, (rows, columns), generator=g)]
    return torch.where(past, noise, logits), lengths, k


CASES = [
    Case("topk", _selection, (kind, rows, columns, k, full))
    for kind in (_distinct, _ties, _relu_zeros, _equal, _infinities, _nans)
    for rows, columns, k, full in (
        (1, 1, 1, True),
        (6, 40, 1, False),
        (9, 64, 16, False),
        (5, 300, 64, True),
        (4, 10, 16, False),
        (40, 700, 128, False),
    )
]

# Rows longer than what a kernel keeps at hand, few and many, of odd width so that most are unaligned.
LONG_CASES = [
    *(
        Case("topk", _selection, (kind, rows, columns, k, full))
        for kind in (
            *(_distinct, _ties, _relu_zeros, _equal, _infinities, _nans),
            *(_rising, _hidden_rising, _falling, _comb, _cluster, _magnitudes),
        )
        for rows, columns, k, full in (
            (1, 131_072, 2048, True),
            (9, 70_001, 2048, False),
            (20, 20_003, 2048, False),
            (40, 33_333, 300, False),
            (70, 12_345, 1, True),
        )
    ),
    Case("topk", _selection, (_distinct, 300, 16_385, 2048, False)),
    Case("topk", _selection, (_distinct, 2, 1_200_000, 2048, True)),
]
