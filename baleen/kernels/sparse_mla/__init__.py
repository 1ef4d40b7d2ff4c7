"""Absorbed MLA over the selected rows of the latent cache. Imports: kernels.{dispatch,kv_store}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "hopper": "baleen.kernels.sparse_mla.hopper:sparse_mla",
    "triton": "baleen.kernels.sparse_mla.triton_kernel:sparse_mla",
    "reference": "baleen.kernels.sparse_mla.reference:sparse_mla",
}

_sparse_mla = Op(IMPLEMENTATIONS)
_sparse_mla_fp8 = Op(IMPLEMENTATIONS, "sparse_mla_fp8")


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
