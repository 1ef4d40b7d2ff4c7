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
