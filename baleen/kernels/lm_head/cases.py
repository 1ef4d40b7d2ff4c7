"""Hidden states and heads: vocabularies that fill no tile, equal logits on both sides of a tile's end and across tiles,
NaN and infinities in some rows of the logits, more rows than the kernel takes."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.bf16_gemm.cases import product
from baleen.kernels.testing import Case


def tied(v: int) -> tuple[tuple[int, ...], ...]:
    """Groups of tokens: on both sides of a tile's end, in tiles far apart, the last one alone."""
    return (15, 16), (63, 64), (127, 128), (255, 256), (0, v - 2), (v - 1,), (v // 2, v - 3), (62, 126, 254)


def ties(r: int, v: int, k: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Whole numbers, whose sums are exact. A row has its largest logit at all tokens of a group.

    All logits are negative: a column beyond the vocabulary, which is zeros, would be the largest.
    """
    groups = tied(v)
    group = torch.arange(k) % len(groups)
    hidden = torch.randint(1, 4, (r, k), generator=g) * (group == torch.arange(r)[:, None] % len(groups))
    weight = torch.randint(-3, 0, (v, k), generator=g)
    for number, tokens in enumerate(groups):
        weight[list(tokens)] = torch.where(group == number, -1, -3)
    return hidden.to(dtype), weight.to(dtype)


def signs(v: int, k: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Infinities in the heads of three tokens, in a column each: the sign there in a row of `hidden` says what the
    row's logit is, and zero makes it NaN. Six rows have no token."""
    hidden, weight = product(7, v, k, 0, dtype, g)
    weight[0, 0] = weight[-1, 1] = torch.inf
    weight[v // 2, 2] = -torch.inf
    hidden[:, :3] = torch.tensor(
        [[1, -1, 1], [-1, 1, 1], [-1, -1, -1], [0, -1, 1], [-1, 0, 1], [-1, -1, 0], [-1, -1, 1]]
    )
    return hidden, weight


def bad_rows(v: int, k: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Rows of nothing but NaN, -inf, +inf, both, and NaN, after one that has a token."""
    hidden, weight = product(6, v, k, 0, dtype, g)
    weight[:, 0] = -1 - weight[:, 0].abs()
    hidden[1, 3] = torch.nan
    hidden[2, 0] = torch.inf
    hidden[3, 0] = -torch.inf
    hidden[4, 1] = torch.inf
    hidden[5, 0], hidden[5, 3] = torch.inf, torch.nan
    return hidden, weight


def one_left(r: int, v: int, k: int, token: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """-inf but at one token, of a low logit."""
    hidden, weight = product(r, v, k, 0, dtype, g)
    hidden[:, 0] = 1
    weight[:, 0] = -torch.inf
    weight[token, 0] = -8
    return hidden, weight


_SHAPES = (
    # tokens, vocabulary, columns, columns beside
    (1, 300, 512, 0),
    (16, 512, 264, 0),
    (7, 600, 7168, 0),
    (33, 200, 1000, 8),
    (40, 600, 7168, 0),
    (128, 257, 904, 16),
    (100, 600, 7168, 0),
    (17, 24, 100, 0),
    (4, 1, 128, 0),
    (200, 300, 72, 0),
    (0, 64, 256, 0),
)
CASES = [
    case
    for dtype in (torch.float32, torch.bfloat16)
    for case in (
        *(Case("lm_head", product, (*shape, dtype), atol=2e-4) for shape in _SHAPES),
        *(Case("lm_head", ties, (r, 300, 128, dtype)) for r in (1, 20, 128, 150)),
        Case("lm_head", signs, (300, 64, dtype), atol=2e-4),
        Case("lm_head", bad_rows, (300, 64, dtype), atol=2e-4),
        Case("lm_head", one_left, (5, 300, 64, 299, dtype), atol=2e-4),
        Case("lm_head", one_left, (130, 70, 64, 0, dtype), atol=2e-4),
    )
]
# A tile of the weight a program, in many tiles: for a CPU's loops too large.
GPU_CASES = [
    *(Case("lm_head", product, (t, 40000, 512, 0, torch.bfloat16), atol=2e-4) for t in (1, 16, 20, 64, 65, 128)),
    *(Case("lm_head", ties, (t, 40000, 512, torch.bfloat16)) for t in (1, 16, 64, 128)),
    *(Case("lm_head", make, (40000, 512, torch.bfloat16), atol=2e-4) for make in (signs, bad_rows)),
    *(Case("lm_head", one_left, (t, 40000, 512, 39999, torch.bfloat16), atol=2e-4) for t in (16, 64, 128)),
]
