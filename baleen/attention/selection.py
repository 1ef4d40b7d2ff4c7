"""The lightning indexer's choice: which cached tokens each query token attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool
from baleen.kernels.fp8_quant import quantize_1x128
from baleen.kernels.hadamard import hadamard
from baleen.kernels.index_logits import index_logits
from baleen.kernels.topk import topk as topk_positions


def select(pool: KVPool, layer: int, group: Group, q: Tensor, weights: Tensor, topk: int) -> Tensor | None:
    """Positions of the `topk` best-scored tokens of each query token of a group, or None if every token is kept.

    q        [G*Q, Hi, D] index queries after rope, float
    weights  [G*Q, Hi] float32 head gates, already times Hi^-0.5 * D^-0.5
    returns  [G*Q, topk] int64 positions ascending, -1 after the last; None when no query of the group sees more than
             topk tokens
    Error:   exact for the keys as stored. With the fp8 index, q is Hadamard-transformed and quantised to e4m3 per head
             as the keys are.
    """
    if group.max_length <= topk:
        return None
    keys, key_scales = pool.read_index(layer, group.page_table)
    if key_scales is not None:
        q, q_scale = quantize_1x128(hadamard(q))
        weights = weights * q_scale.squeeze(-1)
    shape = (group.num_requests, group.num_queries)
    logits = index_logits(q.unflatten(0, shape), weights.unflatten(0, shape), keys, key_scales)
    return topk_positions(logits.flatten(0, 1), group.lengths, topk)


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
