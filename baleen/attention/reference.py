"""Attention in torch, on any device: the definition of the fast backends and the CPU path.

Two forms of the same sum. Absorbed: the query is taken into the latent space (512 + 64) and attends to the selected
rows alone, at a cost that does not grow with the context. Multi-head under the selection mask: keys and values of all
tokens are expanded from the latents (192 and 128 a head), cheaper per pair and without a gather, so the better form for
a prefill chunk over a short context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.attention.absorbed import Latents, absorb, position_slots, rotate
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool, PackedLatent
from baleen.attention.selection import Form, selection_mask, visible_positions
from baleen.kernels.dense_mla import dense_mla
from baleen.kernels.sparse_mla import sparse_mla, sparse_mla_fp8


class ReferenceAttention:
    """See `backend.Attention`."""

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale
        self.dense_prefill_threshold = dense_prefill_threshold

    def form(self, group: Group) -> Form:
        return "positions"

    def everything(self, group: Group) -> None:
        """Made where it is needed: a CPU's masked form needs none."""

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        return rotate(q, cos, sin) if self._is_dense(group) else absorb(q, cos, sin, kv_b)

    def _is_dense(self, group: Group) -> bool:
        return not group.is_decode and group.max_length <= self.dense_prefill_threshold

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Latents | Tensor:
        """See `backend.Attention.attend`."""
        if self._is_dense(group):
            return self._dense(layer, group, q, kv_b, selection)
        return self._absorbed(layer, group, q, selection)

    def _absorbed(self, layer: int, group: Group, q: Tensor, positions: Tensor | None) -> Latents:
        if positions is None:
            positions = visible_positions(group)
        slots = position_slots(group, positions)
        rows = self.pool.latent[layer]
        if isinstance(rows, PackedLatent):
            out = sparse_mla_fp8(q, rows.values, rows.scales, rows.rope, slots, self.softmax_scale)
        else:
            out = sparse_mla(q, rows, slots, self.softmax_scale, self.pool.latent_dim)
        return Latents(out)

    def _dense(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, positions: Tensor | None) -> Tensor:
        rows = self.pool.read_latent(layer, group.context_slots(), q.dtype)
        latent, k_pe = rows.split([self.pool.latent_dim, self.pool.rope_dim], dim=-1)
        nope = self.pool.nope_dim
        keys = rows.new_empty(rows.shape[0], kv_b.shape[0], q.shape[2])
        keys[..., :nope] = torch.matmul(latent, kv_b[:, :nope].transpose(1, 2)).transpose(0, 1)
        keys[..., nope:] = k_pe[:, None]
        values = torch.matmul(latent, kv_b[:, nope:].transpose(1, 2)).transpose(0, 1)
        return dense_mla(q, keys, values, selection_mask(group, positions), self.softmax_scale)
