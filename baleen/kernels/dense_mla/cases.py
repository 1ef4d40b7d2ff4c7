"""Inputs of dense_mla: causal, causal with a prefix, a random selection, queries that see nothing."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _attention(
    queries: int, keys: int, heads: int, dim: int, value_dim: int, kind: str, dtype: torch.dtype, g: torch.Generator
) -> tuple[Any, ...]:
    if kind == "causal":
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    else:
        mask = torch.rand(queries, keys, generator=g) < 0.3
        if kind != "selection":
            mask[:: 4 if kind == "holes" else 1] = False
    q = torch.randn(queries, heads, dim, generator=g)
    # Keys and values as slices of one expanded [S, H, Dqk + Dv], as kv_b_proj gives them.
    both = torch.randn(keys, heads, dim + value_dim, generator=g).to(dtype)
    return q.to(dtype), both[..., :dim], both[..., dim:], mask, dim**-0.5


CASES = [
    Case(
        "dense_mla",
        _attention,
        (*shape, kind, dtype),
        rtol=1e-5 if dtype == torch.float32 else 2**-7,
        atol=5e-6 if dtype == torch.float32 else 1e-3,
    )
    for kind in ("causal", "selection", "holes", "nothing")
    # queries, keys, heads, query and key dim, value dim
    for shape in ((1, 1, 1, 4, 4), (13, 13, 3, 24, 16), (5, 40, 4, 192, 128), (1, 33, 2, 8, 8))
    for dtype in (torch.float32, torch.bfloat16)
]
