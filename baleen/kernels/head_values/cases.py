"""Inputs of head_values and head_values_quant: slices of more heads, halves of one weight, each number of tokens that a
program can have, other dims than the released model's, no token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.testing import Case


def normal(tokens: int, heads: int, width: int, rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [T, H, width] of different magnitude, weight [H, rows, width]."""
    x = torch.randn(tokens, heads, width, generator=g) * torch.exp(2 * torch.randn(tokens, 1, 1, generator=g))
    return x, torch.randn(heads, rows, width, generator=g) * width**-0.5


def exact(tokens: int, heads: int, width: int, rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """As normal, but sums of five small integers, times a power of two for each token: nothing is rounded anywhere,
    to FP8 neither.
    """
    order = torch.rand(tokens, heads, width, generator=g).argsort(-1)
    signs = torch.randint(0, 2, order.shape, generator=g) * 2.0 - 1
    powers = torch.exp2(torch.randint(-3, 9, (tokens, 1, 1), generator=g).float())
    return torch.where(order < 5, signs, 0.0) * powers, torch.randint(-3, 4, (heads, rows, width), generator=g).float()


def _attended(
    numbers: Callable[..., tuple[Tensor, Tensor]],
    tokens: int,
    heads: int,
    value: int,
    latent: int,
    more: int,
    dtype: torch.dtype,
    g: torch.Generator,
) -> tuple[Any, ...]:
    """more: heads that were padded."""
    attended, kv_b = numbers(tokens, heads, latent, 128 + value, g)
    wider = torch.full((tokens, heads + more, latent), torch.nan, dtype=dtype)
    wider[:, :heads] = attended
    return wider[:, :heads], kv_b.to(dtype)[:, 128:]


def _parts(
    numbers: Callable[..., tuple[Tensor, Tensor]],
    tokens: int,
    parts: int,
    heads: int,
    latent: int,
    dtype: torch.dtype,
    g: torch.Generator,
) -> tuple[Any, ...]:
    """Some parts have no row, of the last token all; one head more than the weight has. exact: totals that add up to a
    power of two, and equal maxima.
    """
    attended, kv_b = numbers(tokens, heads + 1, latent, 256, g)
    maxima = (
        torch.zeros(tokens, parts, heads + 1)
        if numbers is exact
        else 3 * torch.randn(tokens, parts, heads + 1, generator=g)
    )
    totals = torch.ones(maxima.shape)
    empty = torch.rand(maxima.shape, generator=g) < 1 / 3
    empty[:, 0] = False
    totals[empty] = 0
    totals[:, 0] = 64 - totals[:, 1:].sum(1)
    # Parts that differ, where a sum may be rounded: what they weigh must show.
    apart = 1 if numbers is exact else torch.rand(*totals.shape, 1, generator=g) * 3 - 0.5
    sums = attended[:, None] * totals[..., None] * apart
    empty[-1] = True
    maxima -= 200  # whose power of two is 0: what is padded must not count
    sums[empty], maxima[empty], totals[empty] = 0, -1e30, 0
    return sums, maxima, totals, kv_b[:heads].to(dtype)[:, 128:]


_F32, _BF16 = torch.float32, torch.bfloat16
_TOKENS = ((1, 3), (5, 2), (16, 2), (17, 3), (40, 2), (70, 2), (128, 1), (130, 1), (0, 2))
# Enough heads for tiles of more tokens.
_WIDE = ((1, 128), (17, 67), (50, 67), (100, 67))


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    """A product of 2 is a step of bfloat16 off where it is rounded the other way, one of cancelled terms more."""
    return {"rtol": 1e-4, "atol": 1e-3} if dtype == _F32 else {"rtol": 2**-7, "atol": 1e-3}


CASES = [
    *(
        Case("head_values", _attended, (normal, *shape, *dims, dtype), **_tolerance(dtype))
        for dtype in (_F32, _BF16)
        for shape, dims in (((3, 4), (128, 512, 3)), ((0, 4), (128, 512, 3)), ((9, 2), (32, 128, 0)))
    ),
    *(
        Case("head_values_quant", _attended, (numbers, *shape, *dims, dtype), flips=flips)
        for dtype in (_F32, _BF16)
        for numbers, flips in ((normal, 2e-3), (exact, 0.0))
        for shape, dims in (
            *((shape, (128, 512, 3)) for shape in _TOKENS),
            ((3, 4), (32, 128, 0)),
            ((3, 2), (256, 128, 0)),
        )
    ),
    *(Case("head_values_quant", _attended, (normal, *shape, 128, 512, 0, _BF16), flips=2e-3) for shape in _WIDE),
    *(
        Case("part_values_quant", _parts, (numbers, *shape, dtype), flips=flips)
        for dtype in (_F32, _BF16)
        for numbers, flips in ((normal, 4e-3), (exact, 0.0))
        for shape in (
            *((1, 1, 2, 512), (2, 1, 2, 512), (2, 13, 2, 512), (2, 32, 3, 512)),
            *((3, 13, 2, 128), (4, 16, 1, 256), (2, 3, 2, 96)),
        )
    ),
]
