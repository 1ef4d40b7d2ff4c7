"""Top-k in torch: the k-th largest score as a threshold, then the positions at or above it."""

from __future__ import annotations

import torch
from torch import Tensor

# The masked copy of a chunk of rows: larger ones cost more in page faults than in arithmetic.
SCRATCH_BYTES = 4 << 20


def topk(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"topk: k is {k}, must be at least 1")
    longest = int(lengths.max()) if lengths.numel() else 0
    if logits.shape[0] == 1 and longest > k:
        return _select(logits[:, :longest], k)
    # Rows no longer than k are right here: every position, then -1.
    positions = torch.arange(k, device=logits.device).expand(logits.shape[0], k)
    out = positions.masked_fill(positions >= lengths[:, None], -1)
    if longest <= k:
        return out
    longer = (lengths > k).nonzero().squeeze(1)
    step = max(SCRATCH_BYTES // (4 * longest), 1)
    for rows in longer.split(step):
        row_lengths = lengths[rows]
        out[rows] = _select(_masked(logits[rows, : int(row_lengths.max())], row_lengths), k)
    return out


def topk_slots(
    logits: Tensor, lengths: Tensor, k: int, page_table: Tensor | None = None, num_queries: int = 1, page_size: int = 64
) -> Tensor:
    return slots_of(topk(logits, lengths, k), page_table, num_queries, page_size)


def slots_of(positions: Tensor, page_table: Tensor | None, num_queries: int, page_size: int) -> Tensor:
    """Positions [T, k], -1 for none, as int32 slots."""
    if page_table is None or not page_table.numel():
        return positions.int()
    pages = positions.clamp(min=0) // page_size
    rows = torch.arange(positions.shape[0], device=positions.device) // num_queries
    slots = page_table[rows[:, None], pages] * page_size + positions.clamp(min=0) % page_size
    return slots.int().masked_fill_(positions < 0, -1)


def topk_mask(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    return mask_of(topk(logits, lengths, k), logits.shape[1])


def mask_of(positions: Tensor, num_columns: int) -> Tensor:
    """Positions [T, k], -1 for none, as bits of int32 words."""
    rows, words = positions.shape[0], (num_columns + 31) // 32
    # -1 lands in one more word, cut off again
    chosen = torch.zeros(rows, 32 * words + 32, dtype=torch.uint8, device=positions.device)
    chosen.scatter_(1, positions.masked_fill(positions < 0, 32 * words), 1)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positions.device)
    chosen = chosen[:, : 32 * words].unflatten(1, (-1, 8)).mul_(weights)
    mask = torch.empty(rows, words, dtype=torch.int32, device=positions.device)
    mask.view(torch.uint8).copy_(chosen.sum(-1, dtype=torch.uint8))
    return mask


def _masked(scores: Tensor, lengths: Tensor) -> Tensor:
    """Overwrites its argument, a copy."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill_(columns >= lengths[:, None], -torch.inf)


def _select(scores: Tensor, k: int) -> Tensor:
    """Positions [T, k] of the k largest. Past a row's end, -inf loses its ties to -inf before it: those come first."""
    threshold = scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = scores >= threshold
    rows, columns = chosen.nonzero(as_tuple=True)
    # A row has at least k, or none if its threshold is NaN: then its number is missing among every k-th.
    one = scores.shape[0] == 1
    if rows.numel() == scores.shape[0] * k and (
        one or torch.equal(rows[::k], torch.arange(scores.shape[0], device=rows.device))
    ):
        return columns.view(-1, k)
    counts = chosen.sum(1)
    if bool((counts < k).any()):
        return _select(scores.nan_to_num(-torch.inf, torch.inf, -torch.inf), k)
    tied = (counts > k).nonzero().squeeze(1)
    chosen[tied] = _without_late_ties(scores[tied], threshold[tied], k)
    return chosen.nonzero()[:, 1].view(-1, k)


def _without_late_ties(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """The scores above the threshold and, of those equal to it, the first that fill up to k."""
    above = scores > threshold
    equal = scores == threshold
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))
