"""What the model calls: plan a batch once, then store, select and attend in every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from baleen.attention.absorbed import Attended, quantized_values, values
from baleen.attention.batch import ForwardBatch, Group, group_batch
from baleen.attention.beside import Beside
from baleen.attention.kv_pool import KeyNorms, KVPool, PackedIndex
from baleen.attention.masked import MaskedAttention
from baleen.attention.selection import Form, select
from baleen.config import ModelConfig
from baleen.kernels.fp8_quant import Quantized, quantize_1x128
from baleen.kernels.index_logits import plan_pages
from baleen.kernels.mla_inputs import index_queries
from baleen.kernels.rope import rope_half

# name of --dsa-prefill-backend / --dsa-decode-backend -> class
ATTENTION = {
    "reference": "baleen.attention.reference:ReferenceAttention",
    "flashmla_sparse": "baleen.attention.flashmla:FlashMlaSparse",
    "flashmla_kv": "baleen.attention.flashmla:FlashMlaKv",
    "triton": "baleen.attention.triton:TritonAttention",
    "fa3": "baleen.attention.fa3:Fa3Attention",
    "tilelang": "baleen.attention.tilelang:TilelangAttention",
    "trtllm": "baleen.attention.trtllm:TrtllmAttention",
    "aiter": "baleen.attention.aiter:AiterAttention",
}


class Attention(Protocol):
    """One attention kernel over the pool.

    form        of the selection it takes: see `selection.Form`
    everything  what stands for a selection that leaves nothing out: a tensor of that form, or None if that does
    """

    def form(self, group: Group) -> Form: ...

    def everything(self, group: Group) -> Tensor | None: ...

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        """A group's queries as `attend` takes them: what of it waits for no selection.

        q         [G*Q, H, nope + rope] as projected, which may be overwritten; cos, sin [G*Q, rope/2] float32
        kv_b      [H, nope + v, latent]: kv_b_proj, per head
        returns   [G*Q, H, ...], rope applied
        """

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Attended:
        """Attention of a group's query tokens to what is selected for them.

        q          as `queries` returns them
        kv_b       [H, nope + v, latent]
        selection  in its form; None: every position up to the query's own
        returns    [G*Q, H, v], or in the absorbed form the latents [G*Q, H, latent] that are still to become that, or
                   parts of them
        """


@dataclass(frozen=True)
class Metadata:
    """What `plan` works out once for all layers of a step."""

    batch: ForwardBatch
    groups: list[Group]
    beside: Beside


class AttentionBackend:
    """DSA over a `KVPool`, with one attention kernel for prefill and one for decode; on a GPU a third for prefill
    chunks whose context is up to `dense_prefill_threshold` tokens.

    A selection is a list with one entry a group, of the form that the group's attention takes.
    """

    def __init__(
        self, model: ModelConfig, pool: KVPool, *, prefill: str, decode: str, dense_prefill_threshold: int
    ) -> None:
        self.pool = pool
        self.index_topk = model.index_topk
        self._dense_threshold = dense_prefill_threshold
        self._prefill = _load(prefill)(pool, model.softmax_scale, dense_prefill_threshold)
        self._decode = self._prefill if decode == prefill else _load(decode)(pool, model.softmax_scale, 0)
        self._dense = MaskedAttention(pool, model.softmax_scale, model.index_topk) if prefill != "reference" else None

    def _attention(self, group: Group) -> Attention:
        if group.is_decode:
            return self._decode
        if self._dense is not None and group.max_length <= self._dense_threshold:
            return self._dense
        return self._prefill

    def plan(self, batch: ForwardBatch, beside: Beside | None = None) -> Metadata:
        """Group the batch; the result is passed back to the other calls of this step. beside: where small kernels of a
        layer may run at once.
        """
        beside = beside or Beside()
        with beside.start():
            groups = [self._planned(group) for group in group_batch(batch)]
        return Metadata(batch, groups, beside)

    def _planned(self, group: Group) -> Group:
        if group.max_length <= self.index_topk:
            return replace(group, everything=self._attention(group).everything(group))
        if not group.is_decode or group.lengths.device.type == "cpu" or not isinstance(self.pool.index[0], PackedIndex):
            return group
        lengths = group.lengths if group.short_lengths is None else group.short_lengths
        return replace(group, pages=plan_pages(group.page_table, lengths))

    def store(
        self,
        layer: int,
        metadata: Metadata,
        latent: Tensor,
        k_pe: Tensor,
        index_k: Tensor,
        norms: KeyNorms,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Write the step's tokens to the cache. latent [T, 512], k_pe [T, 64], index_k [T, 128] as projected; see
        `KVPool.store`.
        """
        self.pool.store(layer, metadata.batch.slots, latent, k_pe, index_k, norms, cos, sin)

    def index_queries(
        self, q: Tensor, gates: Tensor, gate_scale: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Index queries [T, Hi, D] as projected and gates [T, Hi] -> queries in the form of the cached keys, and their
        weights [T, Hi] float32 with every factor of the query side.
        """
        if isinstance(self.pool.index[0], PackedIndex):
            return index_queries(q, gates, gate_scale, cos, sin)
        rope = 2 * cos.shape[1]
        rotated = torch.cat([rope_half(q[..., :rope], cos, sin), q[..., rope:]], dim=-1)
        return rotated.to(self.pool.index[0].dtype), gates.float() * gate_scale

    def select(self, layer: int, metadata: Metadata, q: Tensor, weights: Tensor) -> list[Tensor | None]:
        """Score and pick. q [T, Hi, D], weights [T, Hi] as `index_queries` makes them; see `selection.select`.

        Needs `store` first.
        """
        chosen: list[Tensor | None] = []
        for group in metadata.groups:
            form = self._attention(group).form(group)
            own = q[group.tokens], weights[group.tokens]
            chosen.append(select(self.pool, layer, group, *own, self.index_topk, form))
        return chosen

    def queries(self, metadata: Metadata, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> list[Tensor]:
        """q [T, H, nope + rope] as projected, which may be overwritten -> each group's, for `attend`."""
        parts = []
        for group in metadata.groups:
            rows = group.tokens
            parts.append(self._attention(group).queries(group, q[rows], cos[rows], sin[rows], kv_b))
        return parts

    def attend(
        self, layer: int, metadata: Metadata, queries: list[Tensor], kv_b: Tensor, selection: list[Tensor | None]
    ) -> Tensor:
        """Queries of `queries`, kv_b [H, nope + v, latent] -> [T, H, v]; see `Attention.attend`."""
        nope = self.pool.nope_dim
        outs = [
            values(self._attended(layer, group, own, kv_b, chosen), kv_b, nope)
            for group, own, chosen in zip(metadata.groups, queries, selection)
        ]
        if _is_whole(metadata):
            return outs[0]
        out = outs[0].new_empty(len(metadata.batch.positions), *outs[0].shape[1:])
        for group, part in zip(metadata.groups, outs):
            out[group.tokens] = part
        return out

    def attend_quantized(
        self, layer: int, metadata: Metadata, queries: list[Tensor], kv_b: Tensor, selection: list[Tensor | None]
    ) -> Quantized:
        """As `attend`, the values of each token in one row, quantised 1x128: [T, H * v]."""
        if not _is_whole(metadata):
            return quantize_1x128(self.attend(layer, metadata, queries, kv_b, selection).flatten(1))
        attended = self._attended(layer, metadata.groups[0], queries[0], kv_b, selection[0])
        return quantized_values(attended, kv_b, self.pool.nope_dim)

    def _attended(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Attended:
        chosen = group.everything if selection is None else selection
        return self._attention(group).attend(layer, group, q, kv_b, chosen)

    def needs_scores(self, metadata: Metadata) -> bool:
        """False if no query of the step sees more than `index_topk` tokens: the index keys are stored, nothing is
        scored.
        """
        return any(group.max_length > self.index_topk for group in metadata.groups)


def _is_whole(metadata: Metadata) -> bool:
    """The step is one group, of all tokens in their order."""
    return len(metadata.groups) == 1 and isinstance(metadata.groups[0].tokens, slice)


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
