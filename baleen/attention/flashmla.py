"""Attention by FlashMLA (package sgl-flash-mla) on Hopper, over the selected rows of the cache.

Both kernels take 64 or 128 heads, a latent of 512 and a rope part of 64, in bfloat16, and a number of indices that is a
multiple of 128; -1 is no index, and a query without any attends to nothing and gives 0. V3.2's layouts are the
package's "legacy" ones.
"""

from __future__ import annotations

import torch
from flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from torch import Tensor
from torch.nn.functional import pad

from baleen.attention.absorbed import absorb, head_values, position_slots
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool, PackedLatent
from baleen.attention.selection import visible_positions
from baleen.config import PAGE_SIZE

INDEX_MULTIPLE = 128


class FlashMlaSparse:
    """See `backend.Attention`. Reads bfloat16 rows; for a prefill chunk over an fp8 cache, the context's rows are
    dequantised first, which costs little beside a chunk of queries.
    """

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale

    def attend(
        self, layer: int, group: Group, q: Tensor, w_kc: Tensor, w_vc: Tensor, positions: Tensor | None
    ) -> Tensor:
        """See `backend.Attention.attend`."""
        if positions is None:
            positions = visible_positions(group)
        rows = self.pool.latent[layer]
        if isinstance(rows, PackedLatent):
            assert group.num_requests == 1, "decode over an fp8 cache is flashmla_kv's"
            offsets = torch.arange(PAGE_SIZE, device=q.device)
            slots = (group.page_table[0, :, None] * PAGE_SIZE + offsets).flatten()
            rows = self.pool.read_latent(layer, slots).to(q.dtype)
        else:
            positions = position_slots(group, positions)
        out = flash_mla_sparse_fwd(
            _padded_heads(absorb(q, w_kc)),
            rows.unsqueeze(1),
            _indices(positions),
            self.softmax_scale,
            self.pool.latent_dim,
            use_legacy=True,
            return_log2_lse=False,
        )[0]
        return head_values(out[:, : q.shape[1]], w_vc)


class FlashMlaKv:
    """See `backend.Attention`. Reads the 656-byte rows of the fp8 cache."""

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale
        # How the kernel divides its work depends on the shapes alone. Of decode, whose shapes are few, it is kept, for
        # CUDA graphs too: they hold its address.
        self._schedules: dict[tuple[int, int], object] = {}

    def attend(
        self, layer: int, group: Group, q: Tensor, w_kc: Tensor, w_vc: Tensor, positions: Tensor | None
    ) -> Tensor:
        """See `backend.Attention.attend`."""
        rows = self.pool.latent[layer]
        assert isinstance(rows, PackedLatent)
        indices = _indices(position_slots(group, visible_positions(group) if positions is None else positions))
        schedule = get_mla_metadata()[0]
        if group.is_decode:
            schedule = self._schedules.setdefault((indices.shape[0], indices.shape[2]), schedule)
        out, _ = flash_mla_with_kvcache(
            _padded_heads(absorb(q, w_kc)).unsqueeze(1),
            rows.rows.view(torch.float8_e4m3fn).unflatten(0, (-1, PAGE_SIZE)).unsqueeze(2),
            None,
            None,
            self.pool.latent_dim,
            schedule,
            softmax_scale=self.softmax_scale,
            is_fp8_kvcache=True,
            indices=indices,
            use_legacy=True,
        )
        return head_values(out[:, 0, : q.shape[1]], w_vc)


def _padded_heads(query: Tensor) -> Tensor:
    """[T, H, D] -> [T, 64 or 128, D]."""
    return pad(query, (0, 0, 0, (64 if query.shape[1] <= 64 else 128) - query.shape[1]))


def _indices(positions: Tensor) -> Tensor:
    """[T, k] int64 -> [T, 1, k'] int32, filled up with -1."""
    missing = -positions.shape[1] % INDEX_MULTIPLE
    return pad(positions.int(), (0, missing), value=-1).unsqueeze(1)
