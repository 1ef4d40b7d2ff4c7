"""What the model calls: plan a batch once, then store, select and attend in every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from baleen.attention.batch import ForwardBatch, Group, group_batch
from baleen.attention.kv_pool import KVPool, PackedIndex
from baleen.attention.selection import select
from baleen.config import ModelConfig
from baleen.kernels.index_logits import plan_pages

# name of --dsa-prefill-backend / --dsa-decode-backend -> class
ATTENTION = {
    "reference": "baleen.attention.reference:ReferenceAttention",
    "flashmla_sparse": "baleen.attention.flashmla:FlashMlaSparse",
    "flashmla_kv": "baleen.attention.flashmla:FlashMlaKv",
}


class Attention(Protocol):
    """One attention kernel over the pool."""

    def attend(
        self, layer: int, group: Group, q: Tensor, w_kc: Tensor, w_vc: Tensor, positions: Tensor | None
    ) -> Tensor:
        """Attention of a group's query tokens to their selected positions.

        q          [G*Q, H, nope + rope], rope applied to the last part
        w_kc       [H, nope, latent], w_vc [H, latent, v]: the two halves of kv_b_proj, per head
        positions  [G*Q, k] int64 from `select`, -1 after the last; None: every position up to the query's own
        returns    [G*Q, H, v]
        """


@dataclass(frozen=True)
class Metadata:
    """What `plan` works out once for all layers of a step."""

    batch: ForwardBatch
    groups: list[Group]


class AttentionBackend:
    """DSA over a `KVPool`, with one attention kernel for prefill and one for decode.

    A selection is a list with one entry a group: positions, or None where every token is kept.
    """

    def __init__(
        self, model: ModelConfig, pool: KVPool, *, prefill: str, decode: str, dense_prefill_threshold: int
    ) -> None:
        self.pool = pool
        self.index_topk = model.index_topk
        self._prefill = _load(prefill)(pool, model.softmax_scale, dense_prefill_threshold)
        self._decode = self._prefill if decode == prefill else _load(decode)(pool, model.softmax_scale, 0)

    def plan(self, batch: ForwardBatch) -> Metadata:
        """Group the batch; the result is passed back to the other calls of this step."""
        return Metadata(batch, [self._with_pages(group) for group in group_batch(batch)])

    def _with_pages(self, group: Group) -> Group:
        scored = group.is_decode and group.max_length > self.index_topk
        if not scored or group.lengths.device.type == "cpu" or not isinstance(self.pool.index[0], PackedIndex):
            return group
        return replace(group, pages=plan_pages(group.page_table, group.lengths))

    def store(self, layer: int, metadata: Metadata, latent: Tensor, k_pe: Tensor, index_k: Tensor) -> None:
        """Write the step's tokens to the cache. latent [T, 512], k_pe [T, 64], index_k [T, 128]; see `kv_pool`."""
        self.pool.store(layer, metadata.batch.slots, latent, k_pe, index_k)

    def select(self, layer: int, metadata: Metadata, q: Tensor, weights: Tensor) -> list[Tensor | None]:
        """Score and pick. q [T, Hi, D] after rope, weights [T, Hi] float32; see `selection.select`.

        Needs `store` first.
        """
        return [
            select(self.pool, layer, group, q[group.tokens], weights[group.tokens], self.index_topk)
            for group in metadata.groups
        ]

    def attend(
        self, layer: int, metadata: Metadata, q: Tensor, w_kc: Tensor, w_vc: Tensor, selection: list[Tensor | None]
    ) -> Tensor:
        """q [T, H, nope + rope] -> [T, H, v]; see `Attention.attend`."""
        out = q.new_empty(q.shape[0], q.shape[1], w_vc.shape[2])
        for group, positions in zip(metadata.groups, selection):
            attention = self._decode if group.is_decode else self._prefill
            out[group.tokens] = attention.attend(layer, group, q[group.tokens], w_kc, w_vc, positions)
        return out

    def needs_scores(self, metadata: Metadata) -> bool:
        """False if no query of the step sees more than `index_topk` tokens: the index keys are stored, nothing is
        scored.
        """
        return any(group.max_length > self.index_topk for group in metadata.groups)


def _load(name: str) -> type:
    module, attribute = ATTENTION[name].split(":")
    loaded = getattr(import_module(module), attribute)
    assert isinstance(loaded, type)
    return loaded


def make_backend(
    model: ModelConfig,
    *,
    num_pages: int,
    kv_cache_dtype: str,
    index_cache_dtype: str,
    prefill: str,
    decode: str,
    dense_prefill_threshold: int,
    device: torch.device,
) -> AttentionBackend:
    """A backend with its own pool of `num_pages` usable pages."""
    pool = KVPool(model, num_pages, kv_cache_dtype, index_cache_dtype, device)
    return AttentionBackend(
        model, pool, prefill=prefill, decode=decode, dense_prefill_threshold=dense_prefill_threshold
    )
