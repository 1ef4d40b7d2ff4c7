"""The per-head products of few tokens in Triton.

A program has one head's weight and multiplies it with up to 128 tokens. The weight is the left operand: of its 128 rows
the tensor cores waste none, where of few tokens they would. All of it is on its way before the first product, in as
many stages as there are blocks along the inner dim: it is read at the memory's speed if it is read by all
multiprocessors at once, which takes one program on each of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.triton_kernel import column_stride, empty_quantized, quantize_1x128, store_quantized
from baleen.kernels.head_values import reference

# More tokens go to torch.bmm.
MOST_TOKENS = 128
# By tokens of a program. BLOCK: of the inner dim, at a time.
_TILES = {
    16: {"BLOCK": 128, "num_stages": 5, "num_warps": 4},
    32: {"BLOCK": 128, "num_stages": 5, "num_warps": 4},
    64: {"BLOCK": 64, "num_stages": 8, "num_warps": 8},
    128: {"BLOCK": 64, "num_stages": 6, "num_warps": 8},
}
_PROGRAMS = 132  # that run at once
_SHARED_BYTES = 200 << 10  # that a program may need
_VALUE = 128  # values of a head: one block of FP8


def head_values_quant(attended: Tensor, w_v: Tensor) -> Quantized:
    num_tokens, num_heads, latent = attended.shape
    fits = _runs(attended, w_v) and w_v.shape[1] == _VALUE and latent % 128 == 0
    if not fits or not 0 < num_tokens <= MOST_TOKENS:
        return quantize_1x128(reference.head_values(attended, w_v).flatten(1))
    out = empty_quantized(torch.Size((num_tokens, num_heads * _VALUE)), attended.device)
    tokens = _tile(num_tokens, num_heads)
    _head_values_quant[(num_heads, triton.cdiv(num_tokens, tokens))](
        attended,
        w_v,
        out.values,
        out.scale,
        num_tokens,
        attended.stride(0),
        attended.stride(1),
        w_v.stride(0),
        w_v.stride(1),
        column_stride(num_tokens),
        DIM=latent,
        WIDTH=num_heads * _VALUE,
        TOKENS=tokens,
        **_TILES[tokens],
        # FlashMLA's last kernel may end before the one it follows: it is no kernel to wait for alone.
        **pdl.launch(attended, early=False),
    )
    return out


def part_values_quant(sums: Tensor, maxima: Tensor, totals: Tensor, w_v: Tensor) -> Quantized:
    num_tokens, num_parts, num_heads, latent = sums.shape
    fits = w_v.shape[1] == _VALUE and latent in (128, 256, 512) and w_v.stride(2) == 1 and sums.is_contiguous()
    runs = triton.knobs.runtime.interpret or sums.is_cuda
    if not fits or not runs or not num_tokens or w_v.dtype not in (torch.bfloat16, torch.float32):
        return reference.part_values_quant(sums, maxima, totals, w_v)
    out = empty_quantized(torch.Size((num_tokens, w_v.shape[0] * _VALUE)), sums.device)
    _part_values_quant[(w_v.shape[0], num_tokens)](
        sums,
        maxima.contiguous(),
        totals.contiguous(),
        w_v,
        out.values,
        out.scale,
        num_parts,
        num_heads,
        w_v.stride(0),
        w_v.stride(1),
        column_stride(num_tokens),
        DIM=latent,
        WIDTH=w_v.shape[0] * _VALUE,
        PARTS=triton.next_power_of_2(num_parts),
        BLOCK=64,
        num_warps=8,
        maxnreg=128,  # two on a multiprocessor
        **pdl.launch(sums),
    )
    return out


def _runs(x: Tensor, weight: Tensor) -> bool:
    # The interpreter has no products of bfloat16, a GPU has no room for float32.
    interprets = bool(triton.knobs.runtime.interpret)
    runs = x.dtype == torch.float32 if interprets else x.dtype == torch.bfloat16 and x.is_cuda and _has_room(x.device)
    return runs and x.stride(2) == weight.stride(2) == 1


@lru_cache
def _has_room(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= _SHARED_BYTES  # ROCm does not have it


def _tile(num_tokens: int, num_heads: int) -> int:
    """Tokens of a program: the fewest with which all programs run at once; no more than it takes for all tokens."""
    tokens = 0
    for tokens in _TILES:
        if tokens >= num_tokens or num_heads * triton.cdiv(num_tokens, tokens) <= _PROGRAMS:
            break
    return tokens


@triton.jit(do_not_specialize=["num_tokens", "scale_stride"])
def _head_values_quant(  # type: ignore[no-untyped-def]
    attended,
    weight,
    values,
    scale,
    num_tokens,
    attended_token,
    attended_head,
    weight_head,
    weight_row,
    scale_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head, which is one block of FP8, for a tile of tokens. values [T, WIDTH] contiguous."""
    head = tl.program_id(0)
    value, inner = tl.arange(0, 128), tl.arange(0, BLOCK)
    weight += head.to(tl.int64) * weight_head
    pdl.begin(PDL)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < num_tokens
    left = weight + value[:, None] * weight_row + inner[None, :]
    right = attended + head.to(tl.int64) * attended_head + token[:, None] * attended_token + inner[None, :]
    total = tl.zeros((128, TOKENS), dtype=tl.float32)
    for start in range(0, DIM, BLOCK):
        part = tl.load(left + start)
        rows = tl.load(right + start, mask=inside[:, None], other=0.0)
        total = tl.dot(part, tl.trans(rows), total)
    rounded = tl.trans(total).to(attended.dtype.element_ty).to(tl.float32)
    block = tl.where(inside, head, WIDTH // 128)
    columns = block[:, None] * 128 + value[None, :]
    store_quantized(rounded, values + token[:, None] * WIDTH, scale + token, block, columns, scale_stride, WIDTH)


@triton.jit(do_not_specialize=["num_parts", "num_heads", "scale_stride"])
def _part_values_quant(  # type: ignore[no-untyped-def]
    sums,
    maxima,
    totals,
    weight,
    values,
    scale,
    num_parts,
    num_heads,
    weight_head,
    weight_row,
    scale_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one token. Its weight is asked for, to the L2 cache, while the parts are still made: so small a
    program that all of them find a place beside those.

    sums [T, num_parts, num_heads, DIM], maxima and totals [T, num_parts, num_heads] contiguous
    """
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    value, part, inner = tl.arange(0, 128), tl.arange(0, PARTS), tl.arange(0, BLOCK)
    rows = weight + head.to(tl.int64) * weight_head + value[:, None] * weight_row
    if PDL:
        lines = rows + tl.arange(0, DIM // 64)[None, :] * 64  # of 128 bytes
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
    pdl.begin(PDL)
    row = (token * num_parts + part) * num_heads + head
    inside = part < num_parts
    largest = tl.load(maxima + row, mask=inside, other=-1e30)
    factor = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.sum(factor * tl.load(totals + row, mask=inside, other=0.0), axis=0)
    factor /= tl.where(total > 0, total, 1.0)
    products = tl.zeros((128, BLOCK), dtype=tl.float32)
    for start in tl.static_range(0, DIM, BLOCK):
        run = tl.load(sums + row[:, None] * DIM + (start + inner)[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(rows + (start + inner)[None, :])
        attended = tl.sum(factor[:, None] * run, axis=0).to(weight.dtype.element_ty).to(tl.float32)
        products += w.to(tl.float32) * attended[None, :]
    rounded = tl.sum(products, axis=1).to(weight.dtype.element_ty).to(tl.float32)
    block = head + tl.zeros((1,), dtype=tl.int32)
    columns = block[:, None] * 128 + value[None, :]
    store_quantized(rounded[None, :], values + token * WIDTH, scale + token, block, columns, scale_stride, WIDTH)
