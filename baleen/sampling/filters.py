"""Top-k, top-p and min-p.

Weights are probabilities relative to the likeliest token of the row, as integers in units of 2^-40. Integer sums do not
depend on their order, so a row is cut at the same token whatever the width of the sort, the batch or the device. A
weight and its token id share one int64 sort key, so equal weights rank by lowest id in any sort, stable or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2**40

# Above this the sort key of a token (2^40, then the bits of the id) or the sum of a row would come near 2^63.
MAX_VOCAB_SIZE = 2**22


class Kept(NamedTuple):
    """The likeliest tokens of each row, likeliest first.

    ids       [R, W] int64
    weights   [R, W] int64, units of 2^-40; 0 for a token that is filtered out
    complete  [R] bool; False: W was too small to tell where the row is cut, the rest of the row means nothing
    """

    ids: Tensor
    weights: Tensor
    complete: Tensor


def _rank(weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest weights of each row and their ids, descending, equal weights by lowest id."""
    vocab_size = weights.shape[1]
    id_bits = (vocab_size - 1).bit_length()
    reversed_ids = torch.arange(vocab_size - 1, -1, -1, device=weights.device)
    keys = (weights << id_bits).bitwise_or_(reversed_ids)
    if width < vocab_size:
        ranked = keys.topk(width).values
    else:
        ranked = keys.sort(dim=1, descending=True).values
    ids = (vocab_size - 1) - (ranked & (2**id_bits - 1))
    return ids, ranked >> id_bits


def keep(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int) -> Kept:
    """Filter each row by top-k, then top-p of what is left, then min-p.

    weights  [R, V] float32, probability / largest probability of the row: the largest is 1
    top_k    [R] int64; V keeps all
    top_p    [R] float64: the smallest set of likeliest tokens whose mass is at least top_p, one token at least
    min_p    [R] float64: drops what is less likely than min_p times the likeliest token
    width    how many tokens to rank, <= V. Rows whose top_k is at most `width` are complete; all rows are if it is V
    """
    vocab_size = weights.shape[1]
    fixed = (weights * UNIT).to(torch.int64)
    ids, ranked = _rank(fixed, width)
    top_k = top_k[:, None]
    ranks = torch.arange(width, device=weights.device)
    ranked = ranked.masked_fill_(ranks >= top_k, 0)
    mass = ranked.cumsum(dim=1)
    total = mass[:, -1:]
    if width < vocab_size:
        total = torch.where(top_k <= width, total, fixed.sum(dim=1, keepdim=True))
    needed = (total * top_p[:, None]).ceil_().to(torch.int64).clamp_(min=1)
    floor = (min_p[:, None] * UNIT).ceil_().to(torch.int64).clamp_(max=UNIT)
    is_dropped = (mass - ranked >= needed).logical_or_(ranked < floor)
    if width < vocab_size:
        complete = (top_k <= width) | ((top_k == vocab_size) & (mass[:, -1:] >= needed))
    else:
        complete = torch.ones_like(top_k, dtype=torch.bool)
    return Kept(ids, ranked.masked_fill_(is_dropped, 0), complete[:, 0])
