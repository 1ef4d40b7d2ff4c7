"""Reads of the FP8 caches in Triton: each one pass. The writes are part of mla_inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.kv_store import reference

_ROWS = {"ROWS": 8, "num_warps": 4}
_BLOCK = 128
_PAGE_BYTES = 2048  # of a page copied by one program


def gather_latent_fp8(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    if not _fits(values, rope):
        return reference.gather_latent_fp8(values, scales, rope, slots)
    return _gather(values, scales, rope, slots, torch.float32)


def gather_latent_bf16(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    if not _fits(values, rope):
        return reference.gather_latent_bf16(values, scales, rope, slots)
    return _gather(values, scales, rope, slots, torch.bfloat16)


def gather_index_fp8(keys: Tensor, scales: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
    page_size, dim = keys.shape[1:]
    in_order = keys.stride(1) == dim and keys.stride(2) == 1 and scales.stride(1) == 1
    if not _runs(keys) or not in_order or page_size * dim % _PAGE_BYTES or page_size & (page_size - 1):
        return reference.gather_index_fp8(keys, scales, page_table)
    num_requests, width = page_table.shape
    out = torch.empty(num_requests, width * page_size, dim, dtype=torch.uint8, device=keys.device)
    out_scales = torch.empty(num_requests, width * page_size, dtype=torch.float32, device=keys.device)
    if out.numel():
        _gather_pages[(num_requests * width, page_size * dim // _PAGE_BYTES)](
            keys.view(torch.uint8),
            scales,
            page_table.contiguous(),
            out,
            out_scales,
            KEYS_STRIDE=keys.stride(0),
            SCALES_STRIDE=scales.stride(0),
            PAGE=page_size,
            KEYS_BYTES=page_size * dim,
            BYTES=_PAGE_BYTES,
            num_warps=4,
            **pdl.launch(keys),
        )
    return out.view(torch.float8_e4m3fn), out_scales


def _gather(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    dim, rope_dim = values.shape[1], rope.shape[1]
    out = torch.empty(slots.shape[0], dim + rope_dim, dtype=dtype, device=values.device)
    if out.numel():
        _gather_rows[(triton.cdiv(slots.shape[0], _ROWS["ROWS"]),)](
            values,
            scales,
            rope,
            slots.contiguous(),
            out,
            slots.shape[0],
            VALUES_STRIDE=values.stride(0),
            SCALES_STRIDE=scales.stride(0),
            ROPE_STRIDE=rope.stride(0),
            DIM=dim,
            ROPE_DIM=rope_dim,
            BLOCK=min(dim, _BLOCK),
            **_ROWS,
            **pdl.launch(values),
        )
    return out


def _runs(values: Tensor) -> bool:
    return values.is_cuda or bool(triton.knobs.runtime.interpret)


def _fits(values: Tensor, rope: Tensor) -> bool:
    dim, rope_dim = values.shape[1], rope.shape[1]
    powers = dim & (dim - 1) == 0 and rope_dim & (rope_dim - 1) == 0
    return _runs(values) and powers and values.stride(1) == 1 and rope.stride(1) == 1


# Strides are constants so that the compiler knows how rows are aligned: 656 bytes are 41 times 16.
@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows(  # type: ignore[no-untyped-def]
    values,
    scales,
    rope,
    slots,
    out,
    num_rows,
    VALUES_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS cache rows into out [N, DIM + ROPE_DIM]; rows past the end read slot 0 and write nothing."""
    pdl.begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None]
    slot = tl.load(slots + row, mask=row < num_rows, other=0).to(tl.int64)[:, None]
    target = out + row.to(tl.int64)[:, None] * (DIM + ROPE_DIM)
    dims, blocks, pairs = tl.arange(0, DIM), tl.arange(0, DIM // BLOCK), tl.arange(0, ROPE_DIM)
    latent = tl.load(values + slot * VALUES_STRIDE + dims[None, :]).to(tl.float32)
    scale = tl.load(scales + slot * SCALES_STRIDE + blocks[None, :])
    turned = tl.load(rope + slot * ROPE_STRIDE + pairs[None, :])
    latent = tl.reshape(tl.reshape(latent, (ROWS, DIM // BLOCK, BLOCK)) * scale[:, :, None], (ROWS, DIM))
    tl.store(target + dims[None, :], latent.to(out.dtype.element_ty), mask=inside)
    tl.store(target + DIM + pairs[None, :], turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather_pages(  # type: ignore[no-untyped-def]
    keys,
    scales,
    page_table,
    out,
    out_scales,
    KEYS_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some bytes of one page; its first program copies the scales too."""
    pdl.begin(PDL)
    index = tl.program_id(0).to(tl.int64)
    page = tl.load(page_table + index).to(tl.int64)
    part = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    tl.store(out + index * KEYS_BYTES + part, tl.load(keys + page * KEYS_STRIDE + part))
    if tl.program_id(1) == 0:
        tokens = tl.arange(0, PAGE)
        tl.store(out_scales + index * PAGE + tokens, tl.load(scales + page * SCALES_STRIDE + tokens))
