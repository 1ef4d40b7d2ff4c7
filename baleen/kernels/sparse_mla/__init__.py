"""Absorbed MLA over the selected rows of the latent cache. Imports: kernels.{dispatch,kv_store,pdl,pdl_gluon}."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "hopper": "baleen.kernels.sparse_mla.hopper:sparse_mla",
    "triton": "baleen.kernels.sparse_mla.triton_kernel:sparse_mla",
    "reference": "baleen.kernels.sparse_mla.reference:sparse_mla",
}

_sparse_mla = Op(IMPLEMENTATIONS)
_sparse_mla_fp8 = Op(IMPLEMENTATIONS, "sparse_mla_fp8")
_sparse_mla_fp8_parts = Op(IMPLEMENTATIONS, "sparse_mla_fp8_parts")


class Parts(NamedTuple):
    """What a token's heads attended to, before it is added up over P parts of the token's rows.

    sums    float32 [T, P, H, Dl]: the part's rows, each times 2^(score - maximum); a score is scale * q . row * log2(e)
    maxima  float32 [T, P, H]: the largest score, of no row a very small number
    totals  float32 [T, P, H]: what 2^(score - maximum) add up to, 0 of no row
    """

    sums: Tensor
    maxima: Tensor
    totals: Tensor

    def join(self) -> Tensor:
        """What sparse_mla gives, float32 [T, H, Dl]."""
        factors = torch.exp2(self.maxima - self.maxima.amax(1, keepdim=True))
        total = (factors * self.totals).sum(1)
        joined = (factors[..., None] * self.sums).sum(1)
        return joined / torch.where(total > 0, total, 1.0)[..., None]


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> Tensor:
    """Every head attends to the same k latents of its token: softmax(scale * q . kv[indices]) @ kv[indices, :d_v].

    q        [T, H, Dl+Dr] float32 or bfloat16: the absorbed query, then its rope part
    kv       [N, Dl+Dr] float32 or bfloat16, any row stride: the pool's slots, latent first
    indices  [T, k] int64 or int32 rows of kv; -1 is none, anywhere in the row
    d_v      Dl: the value is the first d_v columns of the key
    returns  [T, H, d_v] q.dtype; 0 for a row without any index; softmax and sums in float32
    Error:   rounding; on a GPU in bfloat16 that of the weights too.
    Cost:    gathers T*k rows. Scratch: in torch about 16 MiB, or one token's rows if larger; on a GPU, for few tokens,
             up to 4*512*H bytes for each 64 indices.
    Source:  DeepSeek-V2 report, section 2.1 (absorbed form); DeepSeek-V3.2 report, section 2.1.
    """
    return _sparse_mla(q, kv, indices, scale, d_v)


def sparse_mla_fp8(q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float) -> Tensor:
    """sparse_mla over the FP8 layout: gathers the rows, dequantises them, same result as on the dequantised pool.

    q        [T, H, Dl+Dr] float32 or bfloat16
    values   float8_e4m3fn [num_slots, Dl]; scales float32 [num_slots, ceil(Dl/128)]; rope bfloat16 [num_slots, Dr]:
             views of the 656-byte rows, see kv_store
    indices  [T, k] int64 or int32 slots; -1 is none
    returns  [T, H, Dl] q.dtype
    Error:   as sparse_mla, cost and scratch too. Scales that are no powers of two below 256 may be rounded to bfloat16.
    """
    return _sparse_mla_fp8(q, values, scales, rope, indices, scale)


def sparse_mla_fp8_parts(
    q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float
) -> Parts:
    """sparse_mla_fp8 of a few tokens, not yet added up: for whoever reads it next anyway, as `head_values` does.

    Arguments as of sparse_mla_fp8; how many parts there are is the implementation's choice.
    Error:  as sparse_mla_fp8, without the rounding of the result.     Cost: the same, and writes the parts.
    """
    result: Parts = _sparse_mla_fp8_parts(q, values, scales, rope, indices, scale)
    return result
