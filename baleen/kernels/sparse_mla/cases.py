"""Inputs of sparse_mla and sparse_mla_fp8: padding at the end, in between, everywhere; NaN in a row nobody asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.kv_store.cases import latent_views
from baleen.kernels.testing import Case


def _indices(tokens: int, selected: int, rows: int, padding: str, g: torch.Generator) -> Tensor:
    """Rows 1..rows-1 of the pool; row 0 is never asked for."""
    indices = 1 + torch.stack([torch.randperm(rows - 1, generator=g)[:selected] for _ in range(tokens)])
    if padding == "end":
        lengths = torch.randint(0, selected // 2, (tokens, 1), generator=g)
        indices = indices.masked_fill(torch.arange(selected) >= lengths, -1)
        indices[0] = -1
    elif padding == "anywhere":
        indices = indices.masked_fill(torch.rand(tokens, selected, generator=g) < 0.4, -1)
    elif padding == "all":
        indices[:] = -1
    return indices


def _attention(
    tokens: int, heads: int, selected: int, latent: int, rope: int, padding: str, dtype: torch.dtype, g: torch.Generator
) -> tuple[Any, ...]:
    pool = torch.randn(2 * selected + 3, latent + rope + 5, generator=g)
    pool[0] = torch.nan
    indices = _indices(tokens, selected, pool.shape[0], padding, g)
    kv = pool.to(dtype)[:, : latent + rope]
    return torch.randn(tokens, heads, latent + rope, generator=g).to(dtype), kv, indices, 0.3, latent


def int32_attention(*parameters: Any) -> tuple[Any, ...]:
    q, kv, indices, scale, d_v = _attention(*parameters)
    return q, kv.contiguous(), indices.int(), scale, d_v


def fp8_attention(
    tokens: int,
    heads: int,
    selected: int,
    latent: int,
    rope: int,
    padding: str,
    dtype: torch.dtype,
    g: torch.Generator,
) -> tuple[Any, ...]:
    width = latent + 4 * -(-latent // 128) + 2 * rope
    values, scales, rope_part = latent_views(torch.zeros(2 * selected + 3, width, dtype=torch.uint8), latent, rope)
    values.copy_(torch.randn(values.shape, generator=g).mul(2).to(torch.float8_e4m3fn))
    scales.copy_(torch.exp2(torch.randint(-2, 2, scales.shape, generator=g).float()))
    rope_part.copy_(torch.randn(rope_part.shape, generator=g))
    scales[0] = torch.nan
    indices = _indices(tokens, selected, values.shape[0], padding, g)
    q = torch.randn(tokens, heads, latent + rope, generator=g).to(dtype)
    return q, values, scales, rope_part, indices.to(torch.int32 if padding == "none" else torch.int64), 0.1


# Rounding of a softmax over scores of size 20 or so: the exponent's error is 20 units in the last place. In bfloat16 a
# weight is off by up to 2^-9 of itself, and FP8 rows have values to some 100.
CASES = [
    *(
        Case(
            "sparse_mla",
            _attention,
            (*shape, padding, dtype),
            rtol=1e-5 if dtype == torch.float32 else 2**-7,
            atol=1e-5 if dtype == torch.float32 else 1e-2,
        )
        for shape in ((1, 1, 2, 16, 4), (5, 3, 12, 16, 4), (3, 8, 20, 512, 64), (9, 2, 6, 130, 8))
        for padding in ("none", "end", "anywhere", "all")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("sparse_mla", int32_attention, (2, heads, 150, 512, 64, padding, torch.bfloat16), rtol=2**-7, atol=1e-2)
        for heads in (8, 70)
        for padding in ("none", "end", "anywhere", "all")
    ),
    *(
        Case(
            "sparse_mla_fp8",
            fp8_attention,
            (*shape, padding, dtype),
            rtol=2e-5 if dtype == torch.float32 else 2**-7,
            atol=1e-4 if dtype == torch.float32 else 0.1,
        )
        for shape in ((3, 8, 20, 512, 64), (5, 3, 12, 64, 16), (2, 70, 150, 512, 64))
        for padding in ("none", "end", "anywhere", "all")
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
