"""Writes of a step into the paged caches, and reads back of the FP8 layouts. Imports: kernels.{dispatch,fp8_quant,pdl}.

The callers own the memory and pass views of it; the byte offsets are theirs. A slot is page * 64 + offset, never
below 0: padding has a page of its own. Slots of one call must differ, else which of the rows stays is open.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.kv_store.triton_kernel:store_rows",
    "reference": "baleen.kernels.kv_store.reference:store_rows",
}

_store_rows = Op(IMPLEMENTATIONS)
_store_latent_fp8 = Op(IMPLEMENTATIONS, "store_latent_fp8")
_gather_latent_fp8 = Op(IMPLEMENTATIONS, "gather_latent_fp8")
_gather_latent_bf16 = Op(IMPLEMENTATIONS, "gather_latent_bf16")
_store_index_fp8 = Op(IMPLEMENTATIONS, "store_index_fp8")
_gather_index_fp8 = Op(IMPLEMENTATIONS, "gather_index_fp8")


def store_rows(dst: Tensor, slots: Tensor, src: Tensor) -> None:
    """dst[slots] = src, cast to dst.dtype: latents of the fp32 and bf16 layouts, index keys of the fp32 layout.

    dst      [num_slots, D] float32 or bfloat16, any strides; written in place
    slots    [T] int64
    src      [T, D] float32 or bfloat16
    Error:   none, or one rounding to dst.dtype.     Cost: reads and writes T*D elements.
    """
    _store_rows(dst, slots, src)


def store_latent_fp8(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor, latent: Tensor, k_pe: Tensor) -> None:
    """Quantises latents 1x128 and writes rows of the FP8 layout; the rope part is never quantised.

    values   float8_e4m3fn [num_slots, Dl], any strides: bytes 0-511 of the 656-byte row
    scales   float32 [num_slots, ceil(Dl/128)]: bytes 512-527
    rope     bfloat16 [num_slots, Dr]: bytes 528-655
    slots    [T] int64
    latent   [T, Dl], k_pe [T, Dr], float32 or bfloat16
    Error:   that of quantize_1x128; k_pe rounds to bfloat16.
    """
    _store_latent_fp8(values, scales, rope, slots, latent, k_pe)


def gather_latent_fp8(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    """Rows of the FP8 layout, dequantised.

    values, scales, rope  as in store_latent_fp8
    slots    [N] int64, all >= 0
    returns  float32 [N, Dl + Dr]
    Error:   none.     Cost: reads 656 bytes a row, writes 2304.
    """
    return _gather_latent_fp8(values, scales, rope, slots)


def gather_latent_bf16(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    """gather_latent_fp8 in bfloat16, for attention over the rows of a context.

    values, scales, rope  as in store_latent_fp8
    slots    [N] int64 or int32, all >= 0
    returns  bfloat16 [N, Dl + Dr]
    Error:   one rounding; none for scales that are powers of two.     Cost: reads 656 bytes a row, writes 1152.
    """
    return _gather_latent_bf16(values, scales, rope, slots)


def store_index_fp8(keys: Tensor, scales: Tensor, slots: Tensor, k: Tensor) -> None:
    """Quantises indexer keys 1x128 and writes them into pages.

    keys     float8_e4m3fn [P, 64, 128], any strides: bytes 0-8191 of a page of 8448
    scales   float32 [P, 64]: bytes 8192-8447, after the keys of all 64 tokens
    slots    [T] int64
    k        [T, 128] float32 or bfloat16, after norm, rope and Hadamard
    Error:   that of quantize_1x128.
    Raises:  ValueError if k is wider than 128: a page has one scale per token.
    """
    _store_index_fp8(keys, scales, slots, k)


def gather_index_fp8(keys: Tensor, scales: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
    """The index keys of whole pages, still quantised, in the form index_logits takes.

    keys, scales  as in store_index_fp8
    page_table    [G, n] int64 page ids, all >= 0 (page 0 pads)
    returns       (float8_e4m3fn [G, n*64, 128], float32 [G, n*64])
    Error:        none.     Cost: reads and writes 132 bytes a token.
    """
    return _gather_index_fp8(keys, scales, page_table)
