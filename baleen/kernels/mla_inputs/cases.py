"""Inputs of store_keys, index_queries and rope_queries: slices of wider rows, both layouts of both caches, no token;
and how far apart results may be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.dispatch import find
from baleen.kernels.kv_store.cases import index_views, latent_views
from baleen.kernels.mla_inputs import IMPLEMENTATIONS
from baleen.kernels.testing import Case, Oracle, assert_close, to_device

NUM_PAGES, PAGE_SIZE = 9, 64
EPS = 1e-6


def _table(count: int, part: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    angles = torch.rand(count, part, generator=g) * 1000
    return angles.cos(), angles.sin()


def check_rounded(name: str, case: Case, oracle: Oracle | None = None, device: str = "cpu") -> None:
    """As testing.check, for numbers that are rounded to bfloat16 on their way to FP8.

    Where such a rounding falls the other way, all dims of a transformed vector move a little, the small ones by more
    than a step of e4m3: FP8 vectors, times their scales, may be a step and 2^-7 of their largest value apart, one value
    in a thousand may be apart at all.
    """
    function = find(IMPLEMENTATIONS, name, case.function)
    expected_by = oracle or find(IMPLEMENTATIONS, "reference", case.function)
    assert function is not None
    assert expected_by is not None
    arguments, expected_arguments = case.arguments(), case.arguments()
    if device != "cpu":
        arguments = to_device(arguments, device)
    got = _results(case.function, arguments, function(*arguments))
    want = _results(case.function, expected_arguments, expected_by(*expected_arguments))
    for a, b in zip(got, want, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert_close(a.cpu(), b, case.rtol, case.atol)
        elif a[0].numel():
            _assert_few_apart(_products(*a), _products(*b))


def _results(function: str, arguments: tuple[Any, ...], output: Any) -> list[Tensor | tuple[Tensor, Tensor]]:
    """What a call left: tensors, and pairs of FP8 vectors [..., K] and their scales [..., ceil(K/128)]."""
    if function == "rope_queries":
        return [arguments[-1]]
    if function == "index_queries":
        return [(output[0], output[1].unsqueeze(-1))]
    latent_cache, index_cache = arguments[-2:]
    results: list[Tensor | tuple[Tensor, Tensor]] = []
    results += [latent_cache[:2], latent_cache[2]] if len(latent_cache) == 3 else latent_cache
    results += [(index_cache[0], index_cache[1].unsqueeze(-1))] if len(index_cache) == 2 else index_cache
    return results


def _products(values: Tensor, scales: Tensor) -> Tensor:
    """float64 [..., blocks, dims of a block]."""
    return values.cpu().double().unflatten(-1, (scales.shape[-1], -1)) * scales.cpu().double().unsqueeze(-1)


def _assert_few_apart(got: Tensor, want: Tensor) -> None:
    apart = ~torch.isclose(got, want, rtol=1e-4, atol=0, equal_nan=True)
    count = int(apart.sum())
    assert count <= 1 + want.numel() // 1000, f"{count} of {want.numel()} FP8 values are apart"
    allowed = torch.maximum(got.abs(), want.abs()) / 8 + want.abs().amax(-1, keepdim=True) / 128
    far = apart & ~((got - want).abs() <= allowed)
    assert not far.any(), f"FP8 values more than a step apart, the first at {far.nonzero()[0].tolist()}"


def empty_caches(
    dim: int, rope_dim: int, key_dim: int, latent_dtype: torch.dtype, index_dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of zeros, so that what stays untouched compares too."""
    latent_cache: tuple[Tensor, ...]
    if latent_dtype == torch.float8_e4m3fn:
        width = dim + dim // 32 + 2 * rope_dim
        rows = torch.zeros(NUM_PAGES * PAGE_SIZE, width, dtype=torch.uint8)
        latent_cache = latent_views(rows, dim, rope_dim)
    else:
        latent_cache = (torch.zeros(NUM_PAGES * PAGE_SIZE, dim + rope_dim, dtype=latent_dtype),)
    if index_dtype == torch.float8_e4m3fn:
        pages = torch.zeros(NUM_PAGES, PAGE_SIZE * (key_dim + 4), dtype=torch.uint8)
        return latent_cache, index_views(pages, key_dim)
    return latent_cache, (torch.zeros(NUM_PAGES * PAGE_SIZE, key_dim, dtype=index_dtype),)


def _store(
    count: int,
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    latent_dtype: torch.dtype,
    index_dtype: torch.dtype,
    g: torch.Generator,
) -> tuple[Any, ...]:
    dim, rope_dim, key_dim = dims
    row = torch.randn(count, 32 + sum(dims), generator=g) * torch.exp(torch.randn(count, 1, generator=g))
    _, index_k, latent, k_pe = row.to(dtype).split([32, key_dim, dim, rope_dim], dim=1)
    return (
        latent,
        k_pe,
        index_k,
        torch.rand(dim, generator=g) + 0.5,
        EPS,
        torch.rand(key_dim, generator=g) + 0.5,
        torch.randn(key_dim, generator=g) / 4,
        EPS,
        *_table(count, rope_dim // 2, g),
        torch.randperm(NUM_PAGES * PAGE_SIZE, generator=g)[:count],
        *empty_caches(dim, rope_dim, key_dim, latent_dtype, index_dtype),
    )


def _queries(
    count: int, heads: int, dim: int, rope_dim: int, dtype: torch.dtype, gates: torch.dtype, g: torch.Generator
) -> tuple[Any, ...]:
    rows = torch.randn(count, 48 + heads * dim, generator=g) * torch.exp(torch.randn(count, 1, generator=g))
    q = rows.to(dtype)[:, 48:].unflatten(1, (heads, dim))
    gate = torch.randn(count, heads + 16, generator=g).to(gates)[:, :heads]
    return q, gate, (heads * dim) ** -0.5, *_table(count, rope_dim // 2, g)


def _rope(
    count: int, heads: int, nope_dim: int, rope_dim: int, dtype: torch.dtype, in_place: bool, g: torch.Generator
) -> tuple[Any, ...]:
    q = torch.randn(count, heads, nope_dim + rope_dim, generator=g).to(dtype)[..., nope_dim:]
    out = q if in_place else torch.zeros(heads, count, rope_dim + 8, dtype=dtype).transpose(0, 1)[..., :rope_dim]
    return q, *_table(count, rope_dim // 2, g), out


_F32, _BF16, _FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
_REAL, _SMALL = (512, 64, 128), (64, 16, 32)

CASES = [
    *(
        Case(
            "store_keys",
            _store,
            parameters,
            # Index keys of 4 after the norm, rounded to bfloat16 before they are rotated.
            rtol=1e-5 if parameters[2] == _F32 else 2**-7,
            atol=1e-5 if parameters[2] == _F32 else 2**-6,
        )
        for parameters in (
            (1, _REAL, _BF16, _FP8, _FP8),
            (13, _REAL, _BF16, _FP8, _FP8),
            (300, _REAL, _BF16, _FP8, _FP8),
            (6, _REAL, _F32, _FP8, _FP8),
            (6, _REAL, _BF16, _BF16, _FP8),
            (6, _REAL, _F32, _F32, _F32),
            (5, _SMALL, _BF16, _F32, _BF16),
            (3, (128, 32, 128), _BF16, _FP8, _FP8),
            (0, _REAL, _BF16, _FP8, _FP8),
        )
    ),
    *(
        Case("index_queries", _queries, parameters)
        for parameters in (
            (1, 64, 128, 64, _BF16, _BF16),
            (7, 32, 128, 64, _BF16, _F32),
            (270, 64, 128, 64, _BF16, _BF16),
            (3, 3, 32, 16, _F32, _F32),
            (0, 64, 128, 64, _BF16, _BF16),
        )
    ),
    *(
        Case("rope_queries", _rope, (*parameters, in_place), rtol=1e-6 if parameters[-1] == _F32 else 2**-7, atol=1e-6)
        for parameters in (
            (1, 128, 128, 64, _BF16),
            (9, 8, 64, 64, _BF16),
            (300, 70, 16, 64, _BF16),
            (5, 3, 8, 16, _F32),
            (0, 128, 128, 64, _BF16),
        )
        for in_place in (False, True)
    ),
]
