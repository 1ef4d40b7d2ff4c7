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

from baleen.attention.absorbed import Attended, Latents, absorb, few_in_parts, position_slots
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool, PackedLatent
from baleen.attention.selection import Form, visible_positions
from baleen.config import PAGE_SIZE

INDEX_MULTIPLE = 128


class FlashMlaSparse:
    """See `backend.Attention`. Reads bfloat16 rows; for a prefill chunk over an fp8 cache, the context's rows are
    dequantised first, which costs little beside a chunk of queries.
    """

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale
        self._dequantizes = isinstance(pool.latent[0], PackedLatent)

    def form(self, group: Group) -> Form:
        return "rows" if self._dequantizes else "slots"

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        return _padded_heads(absorb(q, cos, sin, kv_b))

    def everything(self, group: Group) -> Tensor:
        positions = visible_positions(group)
        return _indices(positions if self._dequantizes else position_slots(group, positions))

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Latents:
        """See `backend.Attention.attend`."""
        assert selection is not None
        rows = self.pool.latent[layer]
        if isinstance(rows, PackedLatent):
            assert group.num_requests == 1, "decode over an fp8 cache is flashmla_kv's"
            rows = self.pool.read_latent(layer, group.context_slots(), q.dtype)
        out = flash_mla_sparse_fwd(
            q,
            rows.unsqueeze(1),
            _indices(selection).unsqueeze(1),
            self.softmax_scale,
            self.pool.latent_dim,
            use_legacy=True,
            return_log2_lse=False,
        )[0]
        return Latents(out[:, : kv_b.shape[0]])


class FlashMlaKv:
    """See `backend.Attention`. Reads the 656-byte rows of the fp8 cache. A few tokens go to our own kernel, whose parts
    are added up with what follows, where FlashMLA adds them up in a launch of its own.
    """

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale
        # How the kernel divides its work depends on the shapes alone. Of decode, whose shapes are few, it is kept, for
        # CUDA graphs too: they hold its address.
        self._schedules: dict[tuple[int, int], object] = {}

    def form(self, group: Group) -> Form:
        return "slots"

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        return _padded_heads(absorb(q, cos, sin, kv_b))

    def everything(self, group: Group) -> Tensor:
        return _indices(position_slots(group, visible_positions(group)))

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Attended:
        """See `backend.Attention.attend`."""
        assert selection is not None
        rows = self.pool.latent[layer]
        assert isinstance(rows, PackedLatent)
        parts = few_in_parts(group, q[:, : kv_b.shape[0]], rows, selection, self.softmax_scale)
        if parts is not None:
            return parts
        indices = _indices(selection).unsqueeze(1)
        schedule = get_mla_metadata()[0]
        if group.is_decode:
            schedule = self._schedules.setdefault((indices.shape[0], indices.shape[2]), schedule)
        out, _ = flash_mla_with_kvcache(
            q.unsqueeze(1),
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
        return Latents(out[:, 0, : kv_b.shape[0]])


def _padded_heads(query: Tensor) -> Tensor:
    """[T, H, D] -> [T, 64 or 128, D]."""
    missing = (64 if query.shape[1] <= 64 else 128) - query.shape[1]
    return pad(query, (0, 0, 0, missing)) if missing else query


def _indices(selection: Tensor) -> Tensor:
    """[T, k] -> [T, k'] int32, filled up with -1."""
    missing = -selection.shape[1] % INDEX_MULTIPLE
    return pad(selection.int(), (0, missing), value=-1) if missing else selection.int()
