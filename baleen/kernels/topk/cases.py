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


def _outliers(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """A few scores so large, and so small, that all others look alike beside them."""
    logits = torch.randn(rows, columns, generator=g)
    logits[:, ::1003] *= 1e30
    return logits


def _offset(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Few different values, far from zero, and many of each."""
    return 1000.0 + torch.rand(rows, columns, generator=g) * 0.05


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


def _slots(
    kind: Any, rows: int, columns: int, k: int, num_queries: int, page_size: int, dtype: torch.dtype, g: torch.Generator
) -> tuple[Any, ...]:
    """The page table is a part of a wider one."""
    logits, lengths, k = _selection(kind, rows, columns, k, False, g)
    num_pages = (columns + page_size - 1) // page_size
    pages = torch.randint(0, 1000, (rows // num_queries, num_pages + 2), generator=g).to(dtype)[:, 1:-1]
    return logits, lengths, k, pages, num_queries, page_size


_KINDS = (_distinct, _ties, _relu_zeros, _equal, _infinities, _nans)

CASES = [
    *(
        Case(function, _selection, (kind, rows, columns, k, full))
        for function, shapes in {
            "topk": (
                *((1, 1, 1, True), (6, 40, 1, False), (9, 64, 16, False)),
                *((5, 300, 64, True), (4, 10, 16, False), (40, 700, 128, False)),
            ),
            "topk_mask": ((3, 1, 1, True), (9, 64, 16, False), (7, 333, 60, False)),
        }.items()
        for kind in _KINDS
        for rows, columns, k, full in shapes
    ),
    *(
        Case("topk_slots", _slots, (kind, rows, columns, k, num_queries, page_size, dtype))
        for kind in (_distinct, _ties)
        for rows, columns, k, num_queries, page_size, dtype in (
            (7, 500, 90, 1, 64, torch.int64),
            (12, 130, 64, 3, 16, torch.int32),
        )
    ),
    Case("topk_slots", _selection, (_distinct, 5, 100, 30, False)),
]

# Rows longer than what a kernel keeps at hand, few and many, of odd width so that most are unaligned.
LONG_CASES = [
    *(
        Case("topk", _selection, (kind, rows, columns, k, full))
        for kind in (*_KINDS, _rising, _hidden_rising, _falling, _comb, _cluster, _magnitudes, _outliers, _offset)
        for rows, columns, k, full in (
            (1, 131_072, 2048, True),
            (9, 70_001, 2048, False),
            (20, 20_003, 2048, False),
            (5, 9000, 2048, False),
            (40, 33_333, 300, False),
            (70, 12_345, 1, True),
        )
    ),
    *(
        Case(function, _selection, (_distinct, rows, columns, 2048, False))
        for function in ("topk", "topk_mask")
        for rows, columns in (
            *((2, 1_200_000), (300, 16_385), (140, 131_072), (50, 40_000), (100, 35_001)),
            *((3, 16_384), (16, 8192), (2, 4096), (200, 8192), (200, 4096), (200, 4093)),
        )
    ),
    *(
        Case("topk_slots", _slots, (kind, rows, columns, 2048, num_queries, 64, dtype))
        for kind in (_distinct, _relu_zeros)
        for rows, columns, num_queries, dtype in (
            (6, 131_072, 1, torch.int64),
            (300, 4096, 300, torch.int64),
            (200, 20_001, 2, torch.int32),
        )
    ),
]
