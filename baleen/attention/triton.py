"""Attention by our own kernels over the selected rows of either cache, for prefill and decode."""

from __future__ import annotations

from torch import Tensor

from baleen.attention.absorbed import Attended, Latents, absorb, few_in_parts, position_slots
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool, PackedLatent
from baleen.attention.selection import Form, visible_positions
from baleen.kernels.sparse_mla import sparse_mla, sparse_mla_fp8


class TritonAttention:
    """See `backend.Attention`. Any number of heads; FP8 rows are read as they are, in prefill too."""

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale

    def form(self, group: Group) -> Form:
        return "slots"

    def everything(self, group: Group) -> Tensor:
        return position_slots(group, visible_positions(group)).int()

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        return absorb(q, cos, sin, kv_b)

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Attended:
        """See `backend.Attention.attend`."""
        assert selection is not None
        rows = self.pool.latent[layer]
        if isinstance(rows, PackedLatent):
            parts = few_in_parts(group, q, rows, selection, self.softmax_scale)
            if parts is not None:
                return parts
            out = sparse_mla_fp8(q, rows.values, rows.scales, rows.rope, selection, self.softmax_scale)
        else:
            out = sparse_mla(q, rows, selection, self.softmax_scale, self.pool.latent_dim)
        return Latents(out)
