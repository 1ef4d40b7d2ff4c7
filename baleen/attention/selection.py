"""The lightning indexer's choice: which cached tokens each query token attends to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool, PackedIndex
from baleen.kernels.index_logits import index_logits, paged_index_logits
from baleen.kernels.topk import topk as topk_positions
from baleen.kernels.topk import topk_mask, topk_slots

# Index keys gathered at once, or those of one request if larger: 64 requests of 16,384 tokens have 512 MiB a layer.
KEY_BYTES = 16 << 20

# Index logits of a prefill chunk made at once: 8192 tokens in a context of 131,072 have 4 GiB.
LOGITS_BYTES = 1 << 30


# How an attention wants the selection of T query tokens.
#   positions  [T, k] int64, rising, then -1        rows  the same as int32
#   slots      [T, k] int32 KV slots in that order  mask  [T, ceil(S/32)] int32, a bit a position
Form = Literal["positions", "rows", "slots", "mask"]


def select(pool: KVPool, layer: int, group: Group, q: Tensor, weights: Tensor, topk: int, form: Form) -> Tensor | None:
    """The `topk` best-scored tokens of each query token of a group, or None if every token is kept.

    q        [G*Q, Hi, D] index queries in the form of the pool's keys: float, or e4m3 after the Hadamard transform
    weights  [G*Q, Hi] float32 head gates, times every other factor of the query side
    returns  the selection in its form; None when no query of the group sees more than topk tokens
    Error:   exact for queries and keys as quantised.
    """
    if group.max_length <= topk:
        return None
    if group.pages is not None:
        keys = pool.index[layer]
        assert isinstance(keys, PackedIndex)
        logits = paged_index_logits(q, weights, keys.keys, keys.scales, group.pages)
        return _pick(logits, group.lengths, topk, form, group.page_table, group.num_queries)
    num_queries = group.num_queries
    lengths = group.lengths.view(-1, num_queries)
    step = max(1, KEY_BYTES // (group.page_table.shape[1] * pool.index_page_bytes))
    chosen = []
    for first in range(0, group.num_requests, step):
        page_table = group.page_table[first : first + step]
        rows = slice(first * num_queries, (first + step) * num_queries)
        requests = lengths[first : first + step]
        chosen.append(_choose(pool, layer, page_table, q[rows], weights[rows], requests, topk, form))
    return torch.cat(chosen) if len(chosen) > 1 else chosen[0]


def _choose(
    pool: KVPool,
    layer: int,
    page_table: Tensor,
    q: Tensor,
    weights: Tensor,
    lengths: Tensor,
    topk: int,
    form: Form,
) -> Tensor:
    """page_table [G, P], lengths [G, Q]; q, weights as in `select`, of these requests' queries -> [G*Q, ...]."""
    keys, key_scales = pool.read_index(layer, page_table)
    q, weights = q.unflatten(0, lengths.shape), weights.unflatten(0, lengths.shape)
    step = max(1, LOGITS_BYTES // (4 * keys.shape[0] * keys.shape[1]))
    chosen = []
    for first in range(0, q.shape[1], step):
        queries = slice(first, first + step)
        logits = index_logits(q[:, queries], weights[:, queries], keys, key_scales, lengths[:, queries])
        ends = lengths[:, queries]
        picked = _pick(logits.flatten(0, 1), ends.flatten(), topk, form, page_table, ends.shape[1])
        chosen.append(picked.unflatten(0, logits.shape[:2]))
    return torch.cat(chosen, dim=1).flatten(0, 1) if len(chosen) > 1 else chosen[0].flatten(0, 1)


def _pick(logits: Tensor, lengths: Tensor, topk: int, form: Form, page_table: Tensor, num_queries: int) -> Tensor:
    """logits [T, S] of num_queries rows a request, lengths [T], page_table [G, P] -> the selection."""
    if form == "positions":
        return topk_positions(logits, lengths, topk)
    if form == "mask":
        return topk_mask(logits, lengths, topk)
    return topk_slots(logits, lengths, topk, page_table if form == "slots" else None, num_queries)


def visible_positions(group: Group) -> Tensor:
    """All positions each query token sees: [G*Q, max_length] int64, -1 after the last.

    The selection when nothing is left out.
    """
    positions = torch.arange(group.max_length, device=group.lengths.device)
    return torch.where(positions < group.lengths[:, None], positions, -1)


def selection_mask(group: Group, positions: Tensor | None) -> Tensor:
    """The selection as a mask. positions as `select` returns them -> [G*Q, max_length] bool, True where attended."""
    if positions is None:
        return torch.arange(group.max_length, device=group.lengths.device) < group.lengths[:, None]
    mask = torch.zeros(positions.shape[0], group.max_length + 1, dtype=torch.bool, device=positions.device)
    # -1 lands in one more column, cut off again
    mask.scatter_(1, positions.masked_fill(positions < 0, group.max_length), True)
    return mask[:, : group.max_length]
