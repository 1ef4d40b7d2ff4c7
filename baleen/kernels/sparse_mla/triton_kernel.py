"""Sparse MLA in Triton for any GPU: bfloat16 queries over bfloat16 or FP8 rows. Float32 is the reference's.

A program attends a block of heads of one token to its selected rows, or, where there are few tokens, to a part of them;
a second kernel then adds up the parts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels.sparse_mla import reference
from baleen.kernels.sparse_mla.shares import empty_parts, multiprocessors, shares

_QUANT_BLOCK = 128
_OPTIONS = {"HEADS": 16, "KEYS": 32, "num_warps": 4, "num_stages": 2}


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> Tensor:
    if q.dtype != torch.bfloat16 or kv.dtype != torch.bfloat16 or not _runs(q):
        return reference.sparse_mla(q, kv, indices, scale, d_v)
    return _launch(q, (kv, kv, kv[:, d_v:]), indices, scale, d_v, FP8=False)


def sparse_mla_fp8(q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float) -> Tensor:
    if q.dtype != torch.bfloat16 or not _runs(q) or not _knows_e4m3(q.device):
        return reference.sparse_mla_fp8(q, values, scales, rope, indices, scale)
    return _launch(q, (values, scales, rope), indices, scale, values.shape[1], FP8=True)


def _runs(q: Tensor) -> bool:
    return q.is_cuda or bool(triton.knobs.runtime.interpret)


@lru_cache
def _knows_e4m3(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _launch(
    q: Tensor, rows: tuple[Tensor, Tensor, Tensor], indices: Tensor, scale: float, d_v: int, FP8: bool
) -> Tensor:
    num_tokens, num_heads, dim = q.shape
    out = torch.empty(num_tokens, num_heads, d_v, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    num_selected = indices.shape[1]
    programs = num_tokens * triton.cdiv(num_heads, _OPTIONS["HEADS"])
    parts, per_part = shares(programs, num_selected, _OPTIONS["KEYS"], 4 * multiprocessors(q.device))
    partial = empty_parts((num_tokens, parts, num_heads, d_v), q.device) if parts > 1 else None
    rope_dim = dim - d_v
    _attend[(programs, parts)](
        q,
        *rows,
        indices,
        out,
        *(partial or (None, None, None)),
        num_selected,
        num_heads,
        per_part,
        scale * 1.4426950408889634,
        q.stride(0),
        q.stride(1),
        *(part.stride(1) for part in rows),
        indices.stride(0),
        *(part.stride(0) for part in rows),
        LATENT=d_v,
        ROPE=rope_dim,
        LATENT_TILE=max(triton.next_power_of_2(d_v), 16),
        ROPE_TILE=max(triton.next_power_of_2(rope_dim), 16),
        QUANT_BLOCK=_QUANT_BLOCK,
        FP8=FP8,
        SPLIT=partial is not None,
        **_OPTIONS,
    )
    if partial is not None:
        combine(*partial, out)
    return out


def combine(sums: Tensor, maxima: Tensor, totals: Tensor, out: Tensor) -> None:
    """Adds up `Parts`."""
    num_tokens, parts, num_heads, d_v = sums.shape
    padded = triton.next_power_of_2(parts)
    tile = min(max(triton.next_power_of_2(d_v), 16), 8192 // padded)
    grid = (num_tokens * num_heads, triton.cdiv(d_v, tile))
    _combine[grid](sums, maxima, totals, out, num_heads, parts, LATENT=d_v, PARTS=padded, TILE=tile, num_warps=4)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    sums, maxima, totals, out, num_heads, parts, LATENT: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr
):
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    part = tl.arange(0, PARTS)
    row = (token * parts + part) * num_heads + head
    largest = tl.load(maxima + row, mask=part < parts, other=-1e30)
    weight = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.sum(weight * tl.load(totals + row, mask=part < parts, other=0.0), axis=0)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (part < parts)[:, None] & (columns < LATENT)[None, :]
    summed = tl.load(sums + row[:, None] * LATENT + columns[None, :], mask=inside, other=0.0)
    result = tl.sum(weight[:, None] * summed, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + (token * num_heads + head) * LATENT + columns, result, mask=columns < LATENT)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    values,
    scales,
    rope,
    indices,
    out,
    sums,
    maxima,
    totals,
    num_selected,
    num_heads,
    per_part,
    scale_log2,
    q_token,
    q_head,
    value_dim,
    scale_dim,
    rope_dim,
    index_token,
    value_row: tl.constexpr,
    scale_row: tl.constexpr,
    rope_row: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_TILE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The token's indices from part * per_part on. Writes out or, with SPLIT, this part's sums, maxima and totals."""
    per_token = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // per_token).to(tl.int64)
    heads = tl.program_id(0) % per_token * HEADS + tl.arange(0, HEADS)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, num_selected)
    keys, dims, ropes = tl.arange(0, KEYS), tl.arange(0, LATENT_TILE), tl.arange(0, ROPE_TILE)
    BLOCKS: tl.constexpr = LATENT_TILE // min(LATENT_TILE, QUANT_BLOCK)
    blocks = tl.arange(0, BLOCKS)
    own, real, real_rope = (heads < num_heads)[:, None], (dims < LATENT)[None, :], (ropes < ROPE)[None, :]
    query = q + token * q_token + heads.to(tl.int64)[:, None] * q_head
    q_latent = tl.load(query + dims[None, :], mask=own & real, other=0.0)
    q_rope = tl.load(query + (LATENT + ropes)[None, :], mask=own & real_rope, other=0.0)
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, LATENT_TILE], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + keys
        index = tl.load(indices + token * index_token + position, mask=position < end, other=-1)
        visible = index >= 0
        row = index.to(tl.int64)[:, None]
        latent = tl.load(values + row * value_row + dims[None, :] * value_dim, mask=visible[:, None] & real, other=0.0)
        k_rope = tl.load(
            rope + row * rope_row + ropes[None, :] * rope_dim, mask=visible[:, None] & real_rope, other=0.0
        )
        if FP8:
            factors = scales + row * scale_row + blocks[None, :] * scale_dim
            factor = tl.load(factors, mask=visible[:, None] & (blocks * QUANT_BLOCK < LATENT)[None, :], other=0.0)
            factor = tl.broadcast_to(factor[:, :, None], [KEYS, BLOCKS, LATENT_TILE // BLOCKS])
            latent = (latent.to(tl.float32) * tl.reshape(factor, [KEYS, LATENT_TILE])).to(tl.bfloat16)
        s = tl.dot(q_latent, tl.trans(latent), tl.dot(q_rope, tl.trans(k_rope)))
        s = tl.where(visible[None, :], s * scale_log2, -float("inf"))
        now = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(tl.bfloat16), latent, acc * shrink[:, None])
        largest = now
    if not SPLIT:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + (token * num_heads + heads)[:, None] * LATENT + dims[None, :]
        tl.store(target, acc.to(tl.bfloat16), mask=own & real)
    else:
        row = (token * tl.num_programs(1) + tl.program_id(1)) * num_heads + heads
        tl.store(maxima + row, largest, mask=heads < num_heads)
        tl.store(totals + row, total, mask=heads < num_heads)
        tl.store(sums + row[:, None] * LATENT + dims[None, :], acc, mask=own & real)
