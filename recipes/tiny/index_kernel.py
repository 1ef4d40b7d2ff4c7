"""Index scores of whole documents on a GPU: fused, since 32 heads of products do not fit the memory's speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(q, gates, keys, out, length, H: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BQ + tl.arange(0, BQ)
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    acc = tl.zeros([BQ, BK], tl.float32)
    if tl.program_id(0) * BK < (tl.program_id(1) + 1) * BQ:
        d = tl.arange(0, D)
        row = b * length + rows
        key = tl.load(keys + (b * length + cols)[:, None] * D + d[None, :], mask=(cols < length)[:, None], other=0.0)
        for h in range(H):
            head = row * H + h
            query = tl.load(q + head[:, None] * D + d[None, :], mask=(rows < length)[:, None], other=0.0)
            gate = tl.load(gates + head, mask=rows < length, other=0.0)
            acc += tl.maximum(tl.dot(query, tl.trans(key)), 0.0) * gate[:, None]
    acc = tl.where(cols[None, :] <= rows[:, None], acc, float("-inf"))
    at = out + (b * length + rows)[:, None] * length + cols[None, :]
    tl.store(at, acc, mask=(rows < length)[:, None] & (cols < length)[None, :])


def causal_index_scores(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """q [B, L, H, D] bfloat16, gates [B, L, H] float32, keys [B, L, D] bfloat16 -> [B, L, L] float32, -inf past the
    diagonal. Error: the products are exact, their sum is float32.
    """
    size, length, heads, dim = q.shape
    out = torch.empty(size, length, length, device=q.device, dtype=torch.float32)
    grid = (triton.cdiv(length, 128), triton.cdiv(length, 64), size)
    _kernel[grid](
        q.to(torch.bfloat16).contiguous(), gates.contiguous(), keys.to(torch.bfloat16).contiguous(), out, length,
        heads, dim, 64, 128, num_warps=4,
    )  # fmt: skip
    return out
