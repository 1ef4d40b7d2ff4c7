"""Attention by FlashAttention-3 (module flash_attn_interface) on Hopper: a paged cache whose pages are single rows.

The kernel adds two products to a score: of q with the 64 rope values of a row, and of qv with its 512 latents, which
are the values too. It takes bfloat16 and any number of heads over the one row that they share.
"""

from __future__ import annotations

from flash_attn_interface import flash_attn_with_kvcache
from torch import Tensor

from baleen.attention.over_rows import OverRows


class Fa3Attention(OverRows):
    """See `backend.Attention`."""

    def over(self, query: Tensor, rows: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """See `OverRows.over`. Each query token is a request of its own; indices past its count are not read."""
        latent = self.pool.latent_dim
        pages = rows[:, None, None]
        out: Tensor = flash_attn_with_kvcache(
            q=query[:, None, :, latent:],
            k_cache=pages[..., latent:],
            v_cache=pages[..., :latent],
            qv=query[:, None, :, :latent],
            cache_seqlens=counts,
            page_table=indices,
            softmax_scale=self.softmax_scale,
        )
        return out[:, 0]
