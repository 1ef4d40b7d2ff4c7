"""Attention by AITER (package amd-aiter) on an AMD GPU. Written to its documentation; never run here.

`mla_decode_fwd` takes a paged cache, here with pages of one row, and the rows of all requests in one list. It reads
bfloat16 and has kernels for 16 and for 128 heads.
"""

from __future__ import annotations

import torch
from aiter.mla import mla_decode_fwd
from torch import Tensor
from torch.nn.functional import pad

from baleen.attention.over_rows import OverRows


class AiterAttention(OverRows):
    """See `backend.Attention`."""

    def over(self, query: Tensor, rows: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """See `OverRows.over`. Each query token is a request of its own."""
        num_tokens, num_heads, _ = query.shape
        heads = 16 if num_heads <= 16 else 128
        out = query.new_empty(num_tokens, heads, self.pool.latent_dim)
        starts = pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        mla_decode_fwd(
            pad(query, (0, 0, 0, heads - num_heads)),
            rows[:, None, None],
            out,
            torch.arange(num_tokens + 1, dtype=torch.int32, device=query.device),
            starts,
            _in_one_list(indices, counts, starts),
            torch.ones_like(counts),
            1,
            sm_scale=self.softmax_scale,
        )
        return out[:, :num_heads]


def _in_one_list(indices: Tensor, counts: Tensor, starts: Tensor) -> Tensor:
    """The first counts[t] of each row [T, k], one row after another from starts[t] on: [T*k] int32, the rest 0."""
    columns = torch.arange(indices.shape[1], device=indices.device)
    # what does not count goes to one more place, cut off again; the host need not know how many there are
    places = torch.where(columns < counts[:, None], starts[:-1, None] + columns, indices.numel())
    one_list = indices.new_zeros(indices.numel() + 1)
    return one_list.scatter_(0, places.flatten(), indices.flatten())[:-1]
