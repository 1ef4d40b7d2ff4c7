"""Attention by a kernel in TileLang, over bfloat16 rows. It fits into the shared memory of compute capability 8.0, 9.0
and 10.0.
"""

# No `from __future__ import annotations` here: TileLang reads the parameters' shapes from evaluated annotations.
# mypy: disable-error-code="valid-type"

import math
from typing import Any

import tilelang
import tilelang.language as T
from torch import Tensor

from baleen.attention.over_rows import OverRows

BLOCK_HEADS, BLOCK_ROWS, THREADS = 64, 64, 256
LOWEST = -1e30


class TilelangAttention(OverRows):
    """See `backend.Attention`."""

    def over(self, query: Tensor, rows: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """See `OverRows.over`."""
        latent = self.pool.latent_dim
        out = query.new_empty(*query.shape[:2], latent)
        dtype = str(query.dtype).removeprefix("torch.")
        kernel = sparse_mla(query.shape[1], latent, self.pool.rope_dim, self.softmax_scale, dtype)
        kernel(query, rows, indices, counts, out)
        return out


@tilelang.jit
def sparse_mla(num_heads: int, latent: int, rope: int, scale: float, dtype: str) -> Any:
    """The kernel of `OverRows.over` for these dims: a block for each token and 64 of its heads.

    A tile of rows is gathered, scored and added to the values, under a softmax that is rescaled when the largest
    score so far rises.
    """
    num_tokens, num_rows, width = T.dynamic("num_tokens"), T.dynamic("num_rows"), T.dynamic("width")
    blocks = -(-num_heads // BLOCK_HEADS)
    log2_scale = scale * math.log2(math.e)

    @T.prim_func
    def attend(
        query: T.Tensor((num_tokens, num_heads, latent + rope), dtype),
        rows: T.Tensor((num_rows, latent + rope), dtype),
        indices: T.Tensor((num_tokens, width), "int32"),
        counts: T.Tensor((num_tokens,), "int32"),
        out: T.Tensor((num_tokens, num_heads, latent), dtype),
    ) -> None:
        with T.Kernel(query.shape[0] * blocks, threads=THREADS) as block:
            token, first = block // blocks, block % blocks * BLOCK_HEADS
            q = T.alloc_shared((BLOCK_HEADS, latent), dtype)
            q_rope = T.alloc_shared((BLOCK_HEADS, rope), dtype)
            kv = T.alloc_shared((BLOCK_ROWS, latent), dtype)
            k_rope = T.alloc_shared((BLOCK_ROWS, rope), dtype)
            chosen = T.alloc_shared((BLOCK_ROWS,), "int32")
            weights = T.alloc_shared((BLOCK_HEADS, BLOCK_ROWS), dtype)
            scores = T.alloc_fragment((BLOCK_HEADS, BLOCK_ROWS), "float32")
            total = T.alloc_fragment((BLOCK_HEADS, latent), "float32")
            highest = T.alloc_fragment((BLOCK_HEADS,), "float32")
            before = T.alloc_fragment((BLOCK_HEADS,), "float32")
            mass = T.alloc_fragment((BLOCK_HEADS,), "float32")
            added = T.alloc_fragment((BLOCK_HEADS,), "float32")

            T.copy(query[token, first : first + BLOCK_HEADS, 0:latent], q)
            T.copy(query[token, first : first + BLOCK_HEADS, latent : latent + rope], q_rope)
            T.clear(total)
            T.clear(mass)
            T.fill(highest, LOWEST)
            for tile in T.serial(T.ceildiv(counts[token], BLOCK_ROWS)):
                start = tile * BLOCK_ROWS
                # past the last row, that one again: a row that nobody has written may hold NaN
                for i in T.Parallel(BLOCK_ROWS):
                    chosen[i] = indices[token, T.min(start + i, counts[token] - 1)]
                for i, d in T.Parallel(BLOCK_ROWS, latent):
                    kv[i, d] = rows[chosen[i], d]
                for i, d in T.Parallel(BLOCK_ROWS, rope):
                    k_rope[i, d] = rows[chosen[i], latent + d]
                T.clear(scores)
                T.gemm(q, kv, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                T.gemm(q_rope, k_rope, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                for h, i in T.Parallel(BLOCK_HEADS, BLOCK_ROWS):
                    scores[h, i] = T.if_then_else(start + i < counts[token], scores[h, i] * log2_scale, LOWEST)
                T.copy(highest, before)
                T.reduce_max(scores, highest, dim=1, clear=False)
                for h, i in T.Parallel(BLOCK_HEADS, BLOCK_ROWS):
                    scores[h, i] = T.exp2(scores[h, i] - highest[h])
                T.reduce_sum(scores, added, dim=1)
                for h in T.Parallel(BLOCK_HEADS):
                    mass[h] = mass[h] * T.exp2(before[h] - highest[h]) + added[h]
                for h, d in T.Parallel(BLOCK_HEADS, latent):
                    total[h, d] = total[h, d] * T.exp2(before[h] - highest[h])
                T.copy(scores, weights)
                T.gemm(weights, kv, total, policy=T.GemmWarpPolicy.FullCol)
            for h, d in T.Parallel(BLOCK_HEADS, latent):
                total[h, d] = total[h, d] / mass[h]
            T.copy(total, out[token, first : first + BLOCK_HEADS, 0:latent])

    return attend
