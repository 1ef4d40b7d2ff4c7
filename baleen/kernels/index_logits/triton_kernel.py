"""Indexer scores in Triton: FP8, a power of two of heads (16 or more) of a power of two of dims (32 or more).

Each tile is one product keys x heads; relu, gates and the sum over heads follow in registers, so that nothing but the
keys is read and nothing but the logits is written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels.index_logits import PagePlan, reference
from baleen.kernels.index_logits.reference import plan_pages as plan_pages

# Programs a launch should have where it can: a few for each of a GPU's multiprocessors.
_NUM_PROGRAMS = 1024
_DECODE = {"KEYS": 64, "num_warps": 4, "num_stages": 4}
_PREFILL = {"KEYS": 128, "STEP": 2, "num_warps": 4, "num_stages": 3}
_QUERIES = 64  # query tokens of a program, a multiple of any STEP


def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor | None, lengths: Tensor | None = None
) -> Tensor:
    if key_scales is None or not _fits(q):
        return reference.index_logits(q, weights, keys, key_scales, lengths)
    num_requests, num_queries, num_heads, dim = q.shape
    num_keys = keys.shape[1]
    out = torch.empty(num_requests, num_queries, num_keys, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(num_queries, _QUERIES), triton.cdiv(num_keys, _PREFILL["KEYS"]), num_requests)
    if out.numel():
        operands = q.contiguous(), weights.contiguous(), keys.contiguous(), key_scales.contiguous()
        _chunk[grid](
            *operands,
            None if lengths is None else lengths.contiguous(),
            out,
            num_queries,
            num_keys,
            QUERIES=_QUERIES,
            HEADS=num_heads,
            DIM=dim,
            **_PREFILL,
        )
    return out


def paged_index_logits(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, plan: PagePlan) -> Tensor:
    if not _fits(q):
        return reference.paged_index_logits(q, weights, keys, key_scales, plan)
    num_requests, num_heads, dim = q.shape
    page_size, width = keys.shape[1], plan.page_table.shape[1]
    out = torch.empty(num_requests, width * page_size, dtype=torch.float32, device=q.device)
    if out.numel():
        # Tiles of one program: few where there are few keys, so that every multiprocessor has some.
        tiles = min(triton.next_power_of_2(triton.cdiv(num_requests * out.shape[1], _NUM_PROGRAMS * 64)), 16)
        options: dict[str, Any] = {"PROGRAM_KEYS": tiles * _DECODE["KEYS"], **_DECODE}
        _pages[(triton.cdiv(out.shape[1], options["PROGRAM_KEYS"]), num_requests)](
            q.contiguous(),
            weights.contiguous(),
            keys,
            key_scales,
            plan.page_table.contiguous(),
            plan.lengths.contiguous(),
            out,
            width,
            keys.stride(0),
            key_scales.stride(0),
            PAGE=page_size,
            HEADS=num_heads,
            DIM=dim,
            **options,
        )
    return out


def _fits(q: Tensor) -> bool:
    num_heads, dim = q.shape[-2:]
    powers = num_heads & (num_heads - 1) == 0 and dim & (dim - 1) == 0
    runs = q.is_cuda or triton.knobs.runtime.interpret
    return runs and q.dtype == torch.float8_e4m3fn and powers and num_heads >= 16 and dim >= 32


@triton.jit
def _pages(  # type: ignore[no-untyped-def]
    q,
    weights,
    keys,
    key_scales,
    page_table,
    lengths,
    out,
    width,
    page_stride,
    scales_stride,
    PROGRAM_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Decode: some tiles of KEYS cached tokens of one request. q, weights, keys as in the contract's paged function."""
    request = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + request)
    begin = tl.program_id(0) * PROGRAM_KEYS
    if begin < length:
        heads, dims, tile = tl.arange(0, HEADS), tl.arange(0, DIM), tl.arange(0, KEYS)
        query = tl.load(q + (request * HEADS + heads[:, None]) * DIM + dims[None, :])
        gates = tl.load(weights + request * HEADS + heads)
        for start in range(begin, tl.minimum(begin + PROGRAM_KEYS, length), KEYS):
            columns = start + tile
            page = tl.load(page_table + request * width + columns // PAGE, mask=columns < length, other=0).to(tl.int64)
            offset = columns % PAGE
            key = tl.load(keys + page[:, None] * page_stride + offset[:, None] * DIM + dims[None, :])
            scale = tl.load(key_scales + page * scales_stride + offset)
            scores = tl.dot(key, tl.trans(query))
            logits = tl.sum(tl.maximum(scores, 0.0) * gates[None, :], axis=1) * scale
            tl.store(out + request * width * PAGE + columns, logits, mask=columns < length)


@triton.jit
def _chunk(  # type: ignore[no-untyped-def]
    q,
    weights,
    keys,
    key_scales,
    lengths,
    out,
    num_queries,
    num_keys,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Prefill: one tile of KEYS keys against QUERIES query tokens, STEP of them in one product."""
    request = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * QUERIES
    begin = tl.program_id(1) * KEYS
    longest = num_keys
    if lengths is not None:
        block = first + tl.arange(0, QUERIES)
        longest = tl.max(tl.load(lengths + request * num_queries + block, mask=block < num_queries, other=0), axis=0)
    if begin < longest:
        columns, dims = begin + tl.arange(0, KEYS), tl.arange(0, DIM)
        row, step = tl.arange(0, STEP * HEADS), tl.arange(0, STEP)
        valid = columns < num_keys
        position = request * num_keys + columns
        key = tl.load(keys + position[:, None] * DIM + dims[None, :], mask=valid[:, None], other=0.0)
        scale = tl.load(key_scales + position, mask=valid, other=0.0)
        for query in range(first, tl.minimum(first + QUERIES, num_queries), STEP):
            head = (request * num_queries + query) * HEADS + row
            inside = query * HEADS + row < num_queries * HEADS
            operand = tl.load(q + head[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
            gates = tl.load(weights + head, mask=inside, other=0.0)
            scores = tl.maximum(tl.dot(key, tl.trans(operand)), 0.0) * gates[None, :]
            logits = tl.sum(tl.reshape(scores, (KEYS, STEP, HEADS)), axis=2) * scale[:, None]
            target = out + (request * num_queries + query + step)[None, :] * num_keys + columns[:, None]
            tl.store(target, logits, mask=valid[:, None] & (query + step < num_queries)[None, :])
