"""Sparse MLA in torch: gather the rows of a few tokens, two batched matmuls, next tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from baleen.kernels.kv_store.reference import gather_latent_fp8
from baleen.kernels.sparse_mla import Parts

# The gathered rows of one chunk of tokens, as float32.
SCRATCH_BYTES = 8 << 20
LOG2_E = 1.4426950408889634
LEAST = -1e30  # the largest score of no row

# (rows [N] int64, buffer float32 [N, Dl+Dr]) -> the rows of the cache as float32 [N, Dl+Dr], in the buffer or not
Gather = Callable[[Tensor, Tensor], Tensor]


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> Tensor:
    def gather(rows: Tensor, buffer: Tensor) -> Tensor:
        if kv.dtype == torch.float32:
            return torch.index_select(kv, 0, rows, out=buffer)
        return kv.index_select(0, rows).float()

    return _attend(q, gather, indices, scale, d_v)


def sparse_mla_fp8(q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float) -> Tensor:
    def gather(rows: Tensor, buffer: Tensor) -> Tensor:
        return gather_latent_fp8(values, scales, rope, rows)

    return _attend(q, gather, indices, scale, values.shape[1])


def sparse_mla_fp8_parts(
    q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float
) -> Parts:
    """One part."""
    missing = indices < 0
    rows = gather_latent_fp8(values, scales, rope, indices.clamp_min(0).flatten()).unflatten(0, indices.shape)
    rows = rows.masked_fill(missing[..., None], 0.0)
    scores = torch.bmm(q.float() * (scale * LOG2_E), rows.transpose(1, 2)).masked_fill_(missing[:, None], -torch.inf)
    maxima = scores.amax(-1).clamp_min(LEAST)
    weights = torch.exp2(scores - maxima[..., None])
    sums = torch.bmm(weights, rows[..., : values.shape[1]])
    return Parts(sums[:, None], maxima[:, None], weights.sum(-1)[:, None])


def _attend(q: Tensor, gather: Gather, indices: Tensor, scale: float, d_v: int) -> Tensor:
    num_tokens, num_heads, dim = q.shape
    num_selected = indices.shape[1]
    out = torch.empty(num_tokens, num_heads, d_v, dtype=q.dtype, device=q.device)
    step = min(max(SCRATCH_BYTES // (4 * dim * max(num_selected, 1)), 1), max(num_tokens, 1))
    # One buffer for all chunks: fresh memory costs as much in page faults as the matmuls take.
    buffer = torch.empty(step * num_selected, dim, dtype=torch.float32, device=q.device)
    for start in range(0, num_tokens, step):
        tokens = slice(start, start + step)
        out[tokens] = _attend_chunk(q[tokens].float() * scale, gather, indices[tokens], d_v, buffer)
    return out


def _attend_chunk(q: Tensor, gather: Gather, indices: Tensor, d_v: int, buffer: Tensor) -> Tensor:
    missing = indices < 0
    padded = bool(missing.any())
    if padded:
        # Columns after the last index of any token cost nothing: in a short context most are such.
        used = (~missing).any(0).nonzero()
        if not used.numel():
            return q.new_zeros(q.shape[0], q.shape[1], d_v)
        width = int(used[-1]) + 1
        indices, missing = indices[:, :width], missing[:, :width]
        # A missing row is read as some row the token has: a slot nobody asked for may hold NaN, and 0 * NaN is NaN.
        indices = torch.where(missing, indices.amax(1, keepdim=True).clamp_(min=0), indices)
    rows = gather(indices.reshape(-1), buffer[: indices.numel()]).view(*indices.shape, -1)
    scores = torch.bmm(q, rows.transpose(1, 2))
    if padded:
        scores.masked_fill_(missing[:, None], -torch.inf)
    out = torch.bmm(torch.softmax(scores, -1), rows[..., :d_v])
    return out.masked_fill_(missing.all(1)[:, None, None], 0.0) if padded else out
