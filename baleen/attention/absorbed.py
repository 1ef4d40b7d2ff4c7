"""The absorbed form of MLA, around the kernel that attends: queries into the latent space, values out of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baleen.attention.batch import Group
from baleen.attention.kv_pool import PackedLatent
from baleen.config import PAGE_SIZE
from baleen.kernels.fp8_quant import Quantized, quantize_1x128
from baleen.kernels.head_values import head_values, head_values_quant, part_values_quant
from baleen.kernels.mla_inputs import rope_queries
from baleen.kernels.sparse_mla import Parts, sparse_mla_fp8_parts
from baleen.kernels.sparse_mla.shares import has_fast_parts

FEW_TOKENS = 1  # of a decode step: up to here the time of attention is that of its launches


class Latents(NamedTuple):
    """What heads attended to in the latent space: [T, H, latent]. `values` and `quantized_values` take it out."""

    rows: Tensor


# What an attention may give: latents, parts of them, or values [T, H, v].
Attended = Latents | Parts | Tensor


def absorb(q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
    """Queries to attend to rows of the cache.

    q         [T, H, nope + rope] as projected; cos, sin [T, rope/2] float32
    kv_b      [H, nope + v, latent]
    returns   [T, H, latent + rope], rope applied
    """
    latent, rope = kv_b.shape[2], 2 * cos.shape[1]
    nope = q.shape[2] - rope
    query = q.new_empty(q.shape[0], q.shape[1], latent + rope)
    torch.bmm(q[..., :nope].transpose(0, 1), kv_b[:, :nope], out=query[..., :latent].transpose(0, 1))
    rope_queries(q[..., nope:], cos, sin, query[..., latent:])
    return query


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rope of q [T, H, nope + rope] in place, and q."""
    rope_part = q[..., q.shape[2] - 2 * cos.shape[1] :]
    rope_queries(rope_part, cos, sin, rope_part)
    return q


def few_in_parts(group: Group, q: Tensor, rows: PackedLatent, selection: Tensor, softmax_scale: float) -> Parts | None:
    """Attention of a few decode tokens q [T, H, latent + rope] to slots [T, k] in parts, which are added up where their
    values are taken out; None where there are more tokens, or that is not faster.
    """
    if not group.is_decode or q.shape[0] > FEW_TOKENS or not has_fast_parts(q, rows.values):
        return None
    return sparse_mla_fp8_parts(q, rows.values, rows.scales, rows.rope, selection, softmax_scale)


def values(attended: Attended, kv_b: Tensor, nope: int) -> Tensor:
    """What `Attention.attend` returns, kv_b [H, nope + v, latent] -> [T, H, v]."""
    if isinstance(attended, Parts):
        attended = Latents(attended.join()[:, : kv_b.shape[0]].to(kv_b.dtype))
    return head_values(attended.rows, kv_b[:, nope:]) if isinstance(attended, Latents) else attended


def quantized_values(attended: Attended, kv_b: Tensor, nope: int) -> Quantized:
    """As `values`, with each token's in one row, quantised: [T, H * v]."""
    if isinstance(attended, Parts):
        return part_values_quant(attended, kv_b[:, nope:])
    if isinstance(attended, Latents):
        return head_values_quant(attended.rows, kv_b[:, nope:])
    return quantize_1x128(attended.flatten(1))


def position_slots(group: Group, positions: Tensor) -> Tensor:
    """Positions [G*Q, k] -> KV slots [G*Q, k] through the page table; -1 stays -1."""
    safe = positions.clamp_min(0)
    shape = (group.num_requests, -1)
    pages = group.page_table.gather(1, (safe // PAGE_SIZE).view(shape)).view_as(positions)
    return torch.where(positions < 0, positions, pages * PAGE_SIZE + safe % PAGE_SIZE)
