"""Top-k in torch operations that never wait for the device, so that a CUDA graph can hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.topk.reference import mask_of, slots_of

# The int64 ranks of a chunk of rows, the largest of a few tensors of its shape.
SCRATCH_BYTES = 64 << 20


def topk(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"topk: k is {k}, must be at least 1")
    rows, columns = logits.shape
    out = torch.full((rows, k), -1, dtype=torch.int64, device=logits.device)
    step = max(SCRATCH_BYTES // (8 * max(columns, 1)), 1)
    for start in range(0, rows if columns else 0, step):
        chunk = slice(start, start + step)
        _select(logits[chunk], lengths[chunk, None], out[chunk])
    return out


def topk_slots(
    logits: Tensor, lengths: Tensor, k: int, page_table: Tensor | None = None, num_queries: int = 1, page_size: int = 64
) -> Tensor:
    return slots_of(topk(logits, lengths, k), page_table, num_queries, page_size)


def topk_mask(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    return mask_of(topk(logits, lengths, k), logits.shape[1])


def _select(logits: Tensor, lengths: Tensor, out: Tensor) -> None:
    """Positions of the k largest into `out` [R, k], which holds -1. lengths [R, 1]."""
    k = out.shape[1]
    columns = torch.arange(logits.shape[1], device=logits.device)
    visible = columns < lengths
    scores = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).masked_fill_(~visible, -torch.inf)
    threshold = scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1:]
    # -inf past a row's end equals a threshold of -inf, but is not visible
    above, equal = scores > threshold, (scores == threshold) & visible
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    # Every chosen position goes to its rank; the others to a column that is cut off.
    rank = (chosen.cumsum(1) - 1).masked_fill_(~chosen, k)
    wide = torch.cat([out, out[:, :1]], dim=1)
    out.copy_(wide.scatter_(1, rank, columns.expand_as(rank))[:, :k])
