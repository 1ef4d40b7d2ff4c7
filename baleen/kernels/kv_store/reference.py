"""Cache writes and reads in torch. FP8 rows are moved as bytes: indexing knows few operations on float8."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.fp8_quant.reference import BLOCK, dequantize_1x128, quantize_1x128


def store_rows(dst: Tensor, slots: Tensor, src: Tensor) -> None:
    dst[slots] = src.to(dst.dtype)


def store_latent_fp8(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor, latent: Tensor, k_pe: Tensor) -> None:
    quantized, scale = quantize_1x128(latent)
    values.view(torch.uint8)[slots] = quantized.view(torch.uint8)
    scales[slots] = scale
    rope[slots] = k_pe.to(rope.dtype)


def gather_latent_fp8(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    # index_select copies whole rows; indexing with [slots] goes byte by byte, 14 times slower.
    quantized = values.view(torch.uint8).index_select(0, slots).view(torch.float8_e4m3fn)
    latent = dequantize_1x128(quantized, scales.index_select(0, slots))
    return torch.cat((latent, rope.index_select(0, slots).float()), dim=1)


def gather_latent_bf16(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    return gather_latent_fp8(values, scales, rope, slots).to(torch.bfloat16)


def store_index_fp8(keys: Tensor, scales: Tensor, slots: Tensor, k: Tensor) -> None:
    if k.shape[1] > BLOCK:
        raise ValueError(f"kv_store: index keys are {k.shape[1]} wide, more than the {BLOCK} of one scale")
    quantized, scale = quantize_1x128(k)
    page_size = keys.shape[1]
    pages, offsets = slots // page_size, slots % page_size
    keys.view(torch.uint8)[pages, offsets] = quantized.view(torch.uint8)
    scales[pages, offsets] = scale.squeeze(1)


def gather_index_fp8(keys: Tensor, scales: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
    pages = page_table.flatten()
    gathered = keys.view(torch.uint8).index_select(0, pages).view(torch.float8_e4m3fn)
    return gathered.view(page_table.shape[0], -1, keys.shape[2]), scales.index_select(0, pages).view(
        page_table.shape[0], -1
    )
