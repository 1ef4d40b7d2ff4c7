"""Values of attention in parts for Hopper, in Gluon: a chain of few waits for memory, where Triton's has one for every
64 columns.

A program has one head of one token. All that it reads of the parts is on its way at once; a thread has its columns of
each and adds them up by itself. The weight, which was asked for into the L2 cache while the parts were still made,
comes in chunks of rows, two ahead of the one that is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from baleen.kernels import pdl, pdl_gluon
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.triton_kernel import column_stride, empty_quantized
from baleen.kernels.head_values import triton_kernel

DIM = gl.constexpr(512)  # of the latent space
VALUE = gl.constexpr(128)  # values of a head: one block of FP8
ROWS = gl.constexpr(16)  # of the weight in a chunk
NUM_WARPS = 8
MOST_PARTS = 32  # whose columns a thread has registers for

# A warp has whole rows of the weight, 16 bytes a thread next to each other.
WEIGHT = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [NUM_WARPS, 1], [1, 0]))
WEIGHT_ROWS = gl.constexpr(gl.SliceLayout(1, WEIGHT.value))
WEIGHT_COLUMNS = gl.constexpr(gl.SliceLayout(0, WEIGHT.value))
PART = gl.constexpr(gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
RESULT = gl.constexpr(gl.BlockedLayout([4], [32], [NUM_WARPS], [0]))
SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def part_values_quant(sums: Tensor, maxima: Tensor, totals: Tensor, w_v: Tensor) -> Quantized:
    num_tokens, num_parts, num_heads, latent = sums.shape
    fits = (w_v.dtype, *w_v.shape[1:], w_v.stride(2)) == (torch.bfloat16, VALUE.value, DIM.value, 1)
    if not fits or latent != DIM.value or not can_run(sums) or num_parts > MOST_PARTS or not num_tokens:
        return triton_kernel.part_values_quant(sums, maxima, totals, w_v)
    out = empty_quantized(torch.Size((num_tokens, w_v.shape[0] * VALUE.value)), sums.device)
    _values[(w_v.shape[0] * num_tokens,)](
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
        WIDTH=w_v.shape[0] * VALUE.value,
        PARTS=1 << (num_parts - 1).bit_length(),
        num_warps=NUM_WARPS,
        maxnreg=128,  # two on a multiprocessor
        **pdl.launch(sums),
    )
    return out


def can_run(sums: Tensor) -> bool:
    """The kernel runs on their device, and they lie as it reads them, by 32-bit numbers."""
    hopper = sums.is_cuda and torch.cuda.get_device_capability(sums.device)[0] == 9
    return hopper and sums.is_contiguous() and sums.numel() < 2**31


@gluon.constexpr_function
def _part_layout(parts):  # type: ignore[no-untyped-def]
    """A thread has two columns of every part."""
    return gl.BlockedLayout([parts, 2], [1, 32], [1, NUM_WARPS], [1, 0])


@gluon.jit
def _rows(weight, weight_row, chunk):  # type: ignore[no-untyped-def]
    """bfloat16 [ROWS, DIM]: a chunk of one head's weight."""
    row = chunk * ROWS + gl.arange(0, ROWS, layout=WEIGHT_ROWS)
    column = gl.arange(0, DIM, layout=WEIGHT_COLUMNS)
    return gl.load(weight + row[:, None] * weight_row + column[None, :])


@gluon.jit
def _joined(sums, maxima, totals, num_parts, num_heads, factors, PARTS: gl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [DIM]: the sum of a head's parts. sums, maxima, totals: of the head's first part; factors: shared memory
    for a number of each.
    """
    layout: gl.constexpr = _part_layout(PARTS)
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    offset = (part * num_heads)[:, None] * DIM + column[None, :]
    run = gl.load(sums + offset, mask=(part < num_parts)[:, None], other=0.0)
    part = gl.arange(0, PARTS, layout=PART)
    largest = gl.load(maxima + part * num_heads, mask=part < num_parts, other=-1e30)
    shares = gl.load(totals + part * num_heads, mask=part < num_parts, other=0.0)
    factor = gl.exp2(largest - gl.max(largest, 0))
    total = gl.sum(factor * shares, 0)
    factors.store(factor * (1.0 / gl.where(total > 0, total, 1.0)))
    return gl.sum(factors.load(gl.SliceLayout(1, layout))[:, None] * run, 0)


@gluon.jit
def _store_quantized(results, values, scale):  # type: ignore[no-untyped-def]
    """As fp8_quant's kernels: of one block of 128."""
    amax = gl.max(results.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    exponent = (gl.maximum(amax, 0x38D1B717) + 0x1FFFFF) >> 23  # at least that of 1e-4
    finite = amax < 0x7F800000
    factor = gl.where(finite, (exponent - 8) << 23, 0x7F800000).to(gl.float32, bitcast=True)
    inverse = gl.where(finite, (254 + 8 - exponent) << 23, 0).to(gl.float32, bitcast=True)
    gl.store(values + gl.arange(0, VALUE, layout=RESULT), (results * inverse).to(gl.float8e4nv))
    gl.store(scale, factor)


@gluon.jit(do_not_specialize=["num_parts", "num_heads", "scale_stride"])
def _values(  # type: ignore[no-untyped-def]
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
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """sums [T, num_parts, num_heads, DIM], maxima and totals [T, num_parts, num_heads]; values [T, WIDTH]."""
    head, token = gl.program_id(0) % (WIDTH // VALUE), gl.program_id(0) // (WIDTH // VALUE)
    shared = gl.allocate_shared_memory(gl.bfloat16, [DIM], SHARED)
    results = gl.allocate_shared_memory(gl.float32, [VALUE], SHARED)
    factors = gl.allocate_shared_memory(gl.float32, [PARTS], SHARED)
    weight += head * weight_head
    if PDL:
        _ask_for(weight, weight_row)
    pdl_gluon.wait(PDL)
    pdl_gluon.let_next_start(PDL)
    rows, following = _rows(weight, weight_row, 0), _rows(weight, weight_row, 1)
    first = token * num_parts * num_heads + head
    attended = _joined(sums + first * DIM, maxima + first, totals + first, num_parts, num_heads, factors, PARTS)
    shared.store(attended.to(gl.bfloat16))
    factor = shared.load(WEIGHT_COLUMNS).to(gl.float32)[None, :]
    for chunk in gl.static_range(VALUE // ROWS):
        after = following
        if chunk + 2 < VALUE // ROWS:
            after = _rows(weight, weight_row, chunk + 2)
        results.slice(chunk * ROWS, ROWS).store(gl.sum(rows.to(gl.float32) * factor, 1))
        rows, following = following, after
    rounded = results.load(RESULT).to(gl.bfloat16).to(gl.float32)
    _store_quantized(rounded, values + token * WIDTH + head * VALUE, scale + token + head * scale_stride)


@gluon.jit
def _ask_for(weight, weight_row):  # type: ignore[no-untyped-def]
    """Has a head's weight brought into the L2 cache."""
    row = gl.arange(0, VALUE, layout=gl.SliceLayout(1, _line_layout()))
    line = gl.arange(0, DIM // 64, layout=gl.SliceLayout(0, _line_layout())) * 64  # of 128 bytes
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l", [weight + row[:, None] * weight_row + line[None, :]], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _line_layout():  # type: ignore[no-untyped-def]
    return gl.BlockedLayout([1, 1], [4, 8], [NUM_WARPS, 1], [1, 0])
