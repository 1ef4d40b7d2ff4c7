"""Inputs of dense_mla: causal, causal with a prefix, a random selection, queries that see nothing; of masked_mha:
chunks at any start, selections dense, sparse and empty, rows that need no mask."""

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


def pack_bits(chosen: torch.Tensor) -> torch.Tensor:
    """[Q, S] bool -> int32 [Q, ceil(S/32)]."""
    bits = torch.nn.functional.pad(chosen, (0, -chosen.shape[1] % 32)).unflatten(1, (-1, 32))
    return (bits.long() << torch.arange(32, device=bits.device)).sum(-1).to(torch.int32)


def masked(
    queries: int, start: int, heads: int, dims: tuple[int, int, int], k: int, kind: str, g: torch.Generator
) -> tuple[Any, ...]:
    """Each query's mask holds k of its tokens, or all if it has no more. kind: what the keys and the mask are like."""
    keys, (nope, rope, value) = start + queries, dims
    lengths = torch.arange(start + 1, keys + 1)[:, None]
    scores = torch.rand(queries, keys, generator=g).masked_fill(torch.arange(keys) >= lengths, -1.0)
    chosen = scores >= scores.topk(min(k, keys)).values[:, -1:] if k else torch.zeros(queries, keys, dtype=torch.bool)
    words = pack_bits(chosen & (scores >= 0))
    if kind == "future":  # what bits of keys after the query hold does not count
        words = words | pack_bits(torch.arange(keys).expand(queries, -1) >= lengths)
    q = torch.randn(queries, heads, nope + rope, generator=g).to(torch.bfloat16)
    both = torch.randn(keys, heads, nope + value, generator=g).to(torch.bfloat16)
    rows = torch.randn(keys, 512 + rope, generator=g).to(torch.bfloat16)
    k_nope, v = both[..., :nope], both[..., nope:]
    if kind == "heads first":
        k_nope, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k_nope, v))
    mask = None if kind == "no mask" else words
    # Large scores, so that what is masked would count if it were not.
    return q, k_nope, rows[:, 512:], v, mask, start, 2 * (nope + rope) ** -0.5, k if kind == "dense rows" else 0


def _masked_cases(dims: tuple[int, int, int], shapes: tuple[tuple[tuple[int, int, int], int, str], ...]) -> list[Case]:
    return [Case("masked_mha", masked, (*shape, dims, k, kind), rtol=2**-7, atol=4e-3) for shape, k, kind in shapes]


CASES += _masked_cases(
    (32, 16, 32),
    (
        # queries, start, heads; tokens a query has chosen
        ((1, 0, 1), 1, "mask"),
        ((1, 300, 2), 7, "mask"),
        ((130, 0, 3), 40, "future"),
        ((130, 0, 3), 40, "no mask"),
        ((70, 200, 2), 64, "dense rows"),
        ((260, 1, 2), 150, "dense rows"),
        ((33, 127, 2), 16, "heads first"),
        ((40, 100, 2), 0, "mask"),
        ((129, 255, 1), 1, "future"),
    ),
)
# Of the model's own dims, for the kernels that take no other.
GPU_CASES = _masked_cases(
    (128, 64, 128),
    (
        ((1, 0, 128), 1, "mask"),
        ((1000, 0, 5), 300, "dense rows"),
        ((1000, 0, 5), 300, "future"),
        ((515, 777, 3), 200, "dense rows"),
        ((384, 128, 20), 100, "heads first"),
        ((200, 1848, 2), 2048, "dense rows"),
        ((300, 77, 2), 0, "mask"),
        ((640, 1000, 9), 64, "no mask"),
    ),
)
