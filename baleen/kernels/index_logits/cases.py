"""Inputs of index_logits: decode and prefill, one request and many, float32 and FP8, across the reference's chunks."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.kv_store.cases import index_views
from baleen.kernels.testing import Case


def _scores(
    requests: int, queries: int, heads: int, keys: int, dim: int, dtype: torch.dtype, scaled: bool, g: torch.Generator
) -> tuple[Any, ...]:
    q, k = torch.randn(requests, queries, heads, dim, generator=g), torch.randn(requests, keys, dim, generator=g)
    weights = torch.randn(requests, queries, heads, generator=g) * (heads * dim) ** -0.5
    scales = torch.exp2(torch.randint(-3, 3, (requests, keys), generator=g).float()) if scaled else None
    return q.to(dtype), weights, k.to(dtype), scales


def paged_inputs(lengths: list[int], heads: int, dim: int, g: torch.Generator) -> tuple[Any, ...]:
    """q, weights, keys, scales, page table, lengths. Each request's pages lie in any order in a pool with others; the
    table is as wide as the longest needs."""
    width = -(-max(lengths) // 64)
    num_pages = 1 + width * len(lengths)
    keys, scales = index_views(torch.zeros(num_pages, 64 * (dim + 4), dtype=torch.uint8), dim)
    keys.copy_(torch.randn(keys.shape, generator=g).to(torch.float8_e4m3fn))
    scales.copy_(torch.exp2(torch.randint(-3, 3, scales.shape, generator=g).float()))
    table = 1 + torch.randperm(num_pages - 1, generator=g).view(len(lengths), width)
    q = torch.randn(len(lengths), heads, dim, generator=g).to(torch.float8_e4m3fn)
    weights = torch.randn(len(lengths), heads, generator=g) * (heads * dim) ** -0.5
    return q, weights, keys, scales, table, torch.tensor(lengths)


# Rounding of float32 sums of 128 products and 64 heads, with scales up to 4.
CASES = [
    Case("index_logits", _scores, (*shape, dtype, scaled), rtol=1e-5, atol=4e-5)
    for shape in (
        # requests, queries, heads, keys, dim
        (1, 1, 64, 1, 128),
        (3, 1, 16, 70, 128),
        (2, 1, 4, 1300, 16),
        (1, 9, 32, 65, 128),
        (2, 3, 4, 700, 8),
        (2, 2, 3, 0, 8),
    )
    for dtype, scaled in ((torch.float32, False), (torch.float32, True), (torch.float8_e4m3fn, True))
]
