"""Inputs of the cache writes and reads: strided views of one buffer as the pool has them; no token too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.testing import Case

NUM_PAGES = 5
PAGE_SIZE = 64


def latent_views(rows: Tensor, latent_dim: int, rope_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [num_slots, row bytes] -> values, scales, rope. 512 and 64 give the 656-byte row."""
    end = latent_dim + 4 * -(-latent_dim // 128)
    return (
        rows[:, :latent_dim].view(torch.float8_e4m3fn),
        rows[:, latent_dim:end].view(torch.float32),
        rows[:, end : end + 2 * rope_dim].view(torch.bfloat16),
    )


def index_views(pages: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """uint8 [num_pages, 64 * (dim + 4)] -> keys [num_pages, 64, dim], scales [num_pages, 64]. 128 gives 8448 bytes."""
    keys = pages[:, : PAGE_SIZE * dim].view(torch.float8_e4m3fn).unflatten(1, (PAGE_SIZE, dim))
    return keys, pages[:, PAGE_SIZE * dim :].view(torch.float32)


def _slots(count: int, g: torch.Generator) -> Tensor:
    return torch.randperm(NUM_PAGES * PAGE_SIZE, generator=g)[:count]


def _rows(count: int, dim: int, dtype: torch.dtype, src_dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    pool = torch.randn(NUM_PAGES * PAGE_SIZE, dim + 8, generator=g).to(dtype)
    return pool[:, 3 : 3 + dim], _slots(count, g), torch.randn(count, dim, generator=g).to(src_dtype)


def _latent_buffer(latent_dim: int, rope_dim: int, g: torch.Generator) -> Tensor:
    width = latent_dim + 4 * -(-latent_dim // 128) + 2 * rope_dim
    # Below 0x38 no byte pattern is a NaN in any of the three types.
    return torch.randint(0, 0x38, (NUM_PAGES * PAGE_SIZE, width), generator=g).to(torch.uint8)


def _store_latent(count: int, latent_dim: int, rope_dim: int, g: torch.Generator) -> tuple[Any, ...]:
    views = latent_views(_latent_buffer(latent_dim, rope_dim, g), latent_dim, rope_dim)
    latent, k_pe = torch.randn(count, latent_dim, generator=g) * 5, torch.randn(count, rope_dim, generator=g)
    return *views, _slots(count, g), latent, k_pe


def _gather_latent(count: int, latent_dim: int, rope_dim: int, g: torch.Generator) -> tuple[Any, ...]:
    return *latent_views(_latent_buffer(latent_dim, rope_dim, g), latent_dim, rope_dim), _slots(count, g)


def _index_buffer(dim: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, 0x38, (NUM_PAGES, PAGE_SIZE * (dim + 4)), generator=g).to(torch.uint8)


def _store_index(count: int, dim: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    keys = torch.randn(count, dim, generator=g) * 5
    return *index_views(_index_buffer(dim, g), dim), _slots(count, g), keys.to(dtype)


def _gather_index(table: list[list[int]], dim: int, g: torch.Generator) -> tuple[Any, ...]:
    return *index_views(_index_buffer(dim, g), dim), torch.tensor(table)


CASES = [
    *(
        Case("store_rows", _rows, (count, dim, dst, src))
        for count, dim in ((1, 4), (70, 576), (3, 128), (0, 8))
        for dst, src in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
        )
    ),
    *(
        Case("store_latent_fp8", _store_latent, parameters)
        for parameters in ((1, 512, 64), (20, 512, 64), (5, 64, 16), (0, 512, 64))
    ),
    *(
        Case(function, _gather_latent, parameters)
        for function in ("gather_latent_fp8", "gather_latent_bf16")
        for parameters in ((1, 512, 64), (20, 512, 64), (5, 64, 16), (0, 512, 64))
    ),
    *(
        Case("store_index_fp8", _store_index, (count, dim, dtype))
        for count, dim in ((1, 128), (40, 128), (6, 32), (0, 128))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("gather_index_fp8", _gather_index, parameters)
        for parameters in (([[1, 2, 0], [4, 0, 0]], 128), ([[3]], 32))
    ),
]
