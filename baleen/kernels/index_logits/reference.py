"""Indexer scores in torch, in chunks of queries and keys whose products stay in cache, or nearly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baleen.kernels.fp8_quant.reference import widen
from baleen.kernels.index_logits import PagePlan
from baleen.kernels.kv_store.reference import gather_index_fp8

# Products of one chunk, and its keys where FP8 has to be widened.
SCRATCH_BYTES = 2 << 20
KEYS_PER_CHUNK = 512


def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor | None, lengths: Tensor | None = None
) -> Tensor:
    q = _float32(q)
    logits = torch.empty(q.shape[0], q.shape[1], keys.shape[1], dtype=torch.float32, device=q.device)
    if q.shape[1] == 1:
        _one_query_each(q[:, 0], weights[:, 0], keys, logits[:, 0])
    else:
        for request in range(q.shape[0]):
            ends = None if lengths is None else lengths[request]
            _many_queries(q[request], weights[request], keys[request], ends, logits[request])
    return logits if key_scales is None else logits.mul_(key_scales.unsqueeze(1))


def plan_pages(page_table: Tensor, lengths: Tensor) -> PagePlan:
    return PagePlan(page_table.int(), lengths.int().unsqueeze(1), None)


def paged_index_logits(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, plan: PagePlan) -> Tensor:
    gathered, scales = gather_index_fp8(keys, key_scales, plan.page_table)
    return index_logits(q.unsqueeze(1), weights.unsqueeze(1), gathered, scales).squeeze(1)


def _one_query_each(q: Tensor, weights: Tensor, keys: Tensor, logits: Tensor) -> None:
    """Decode. q [G, Hi, D], weights [G, Hi], keys [G, S, D], logits [G, S]: all requests at once, keys as rows."""
    num_requests, num_heads, head_dim = q.shape
    queries, gates = q.transpose(1, 2), weights.unsqueeze(2)
    widened = 0 if keys.dtype == torch.float32 else head_dim
    step = max(SCRATCH_BYTES // (4 * num_requests * (num_heads + widened)), 1)
    for start in range(0, keys.shape[1], step):
        chunk = slice(start, start + step)
        products = torch.bmm(_float32(keys[:, chunk]), queries).relu_()
        torch.bmm(products, gates, out=logits[:, chunk, None])


def _many_queries(q: Tensor, weights: Tensor, keys: Tensor, lengths: Tensor | None, logits: Tensor) -> None:
    """Prefill of one request. q [Q, Hi, D], weights [Q, Hi], keys [S, D], lengths [Q], logits [Q, S]."""
    num_queries, num_heads, head_dim = q.shape
    gates = weights.unsqueeze(1)
    num_columns = min(KEYS_PER_CHUNK, keys.shape[0])
    step = max(SCRATCH_BYTES // (4 * num_heads * max(num_columns, 1)), 1)
    chunks = [slice(first, first + step) for first in range(0, num_queries, step)]
    # How far a chunk's queries see: tiles of keys behind that are left out.
    ends = [keys.shape[0] if lengths is None else int(lengths[rows].max()) for rows in chunks]
    # Memory that is asked for anew costs page faults, a third of a product's time; sums go through a tile of their own,
    # since a product into rows apart is made row by row.
    products = torch.empty(step * num_heads * num_columns, device=q.device)
    sums = torch.empty(step * num_columns, device=q.device)
    for start in range(0, max(ends, default=0), KEYS_PER_CHUNK):
        chunk = _float32(keys[start : start + KEYS_PER_CHUNK]).t()
        for rows, end in zip(chunks, ends):
            width = min(end - start, chunk.shape[1])
            if width <= 0:
                continue
            queries = q[rows].reshape(-1, head_dim)
            shape = (queries.shape[0] // num_heads, num_heads, width)
            tile = products[: math.prod(shape)].view(-1, width)
            torch.mm(queries, chunk[:, :width], out=tile).relu_()
            total = sums[: shape[0] * width].view(-1, 1, width)
            torch.bmm(gates[rows], tile.view(shape), out=total)
            logits[rows, start : start + width] = total[:, 0]


def _float32(x: Tensor) -> Tensor:
    return widen(x) if x.dtype == torch.float8_e4m3fn else x
