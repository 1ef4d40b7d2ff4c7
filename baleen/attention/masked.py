"""Prefill over a short context on a GPU: multi-head attention under the selection's mask.

Keys and values of all heads are expanded from the context's latents, 192 and 128 wide; a pair costs 320 multiply-adds a
head, against 1,088 in the latent space, so that leaving out what is not selected pays only from some ten thousand
tokens on. The result is that of the absorbed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.attention.absorbed import rotate
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool
from baleen.attention.selection import Form
from baleen.kernels.dense_mla import masked_mha


class MaskedAttention:
    """See `backend.Attention`. Prefill groups only: one request each."""

    def __init__(self, pool: KVPool, softmax_scale: float, index_topk: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale
        self.index_topk = index_topk

    def form(self, group: Group) -> Form:
        return "mask"

    def everything(self, group: Group) -> None:
        """No mask at all."""

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        return rotate(q, cos, sin)

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Tensor:
        """See `backend.Attention.attend`."""
        rows = self.pool.read_latent(layer, group.context_slots(), q.dtype)
        latent, k_pe = rows.split([self.pool.latent_dim, self.pool.rope_dim], dim=-1)
        nope = self.pool.nope_dim
        expanded = torch.mm(latent, kv_b.flatten(0, 1).t()).unflatten(1, kv_b.shape[:2])
        keys, values = expanded[..., :nope], expanded[..., nope:]
        start = group.max_length - group.num_queries
        return masked_mha(q, keys, k_pe, values, selection, start, self.softmax_scale, self.index_topk)
