"""Masked multi-head attention in torch, in chunks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

# The scores of one chunk of queries, all heads.
SCRATCH_BYTES = 8 << 20


def dense_mla(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    num_queries, num_heads, _ = q.shape
    num_keys = k.shape[0]
    out = torch.empty(num_queries, num_heads, v.shape[2], dtype=q.dtype, device=q.device)
    queries, keys, values = (q.float() * scale).transpose(0, 1), k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    step = min(max(SCRATCH_BYTES // (4 * num_heads * max(num_keys, 1)), 1), max(num_queries, 1))
    # One buffer for all chunks: fresh memory costs as much in page faults as the matmuls take.
    buffer = torch.empty(num_heads * step * num_keys, dtype=torch.float32, device=q.device)
    for start in range(0, num_queries, step):
        chunk = slice(start, start + step)
        blocked = ~mask[chunk]
        # Keys after the last one any of these queries sees: under a causal mask, half of all.
        used = (~blocked).any(0).nonzero()
        if not used.numel():
            out[chunk] = 0.0
            continue
        width = int(used[-1]) + 1
        blocked = blocked[:, :width]
        scores = buffer[: num_heads * blocked.numel()].view(num_heads, -1, width)
        torch.bmm(queries[:, chunk], keys[..., :width], out=scores).masked_fill_(blocked, -torch.inf)
        attended = torch.bmm(torch.softmax(scores, -1, out=scores), values[:, :width])
        out[chunk] = attended.masked_fill_(blocked.all(1)[:, None], 0.0).transpose(0, 1)
    return out


def masked_mha(
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    mask: Tensor | None,
    start: int,
    scale: float,
    dense_rows: int = 0,
) -> Tensor:
    num_keys, num_heads, _ = k_nope.shape
    keys = torch.cat((k_nope, k_pe[:, None].expand(-1, num_heads, -1)), -1)
    return dense_mla(q, keys, v, visible(len(q), num_keys, mask, start, dense_rows, q.device), scale)


def visible(
    num_queries: int, num_keys: int, mask: Tensor | None, start: int, dense_rows: int, device: torch.device
) -> Tensor:
    """[Q, S] bool: the causal mask and the bits of `masked_mha`."""
    key = torch.arange(num_keys, device=device)
    position = torch.arange(start, start + num_queries, device=device)[:, None]
    causal = key <= position
    if mask is None:
        return causal
    chosen = (mask[:, key // 32] >> (key % 32).int()) & 1 == 1
    return causal & (chosen | (position < dense_rows))
