"""Experts' products of few tokens for Hopper, in Gluon: each weight streams through the GPU once, whatever its tokens.

Rows lie masked, as `layout.masked` lays them. Persistent programs of two groups of four warps, which multiply, and two
warps, which load (TMA), one the weight and one the tokens. The weight is the left side, of which the tensor cores take
64 rows; the right side has about as many columns as the expert has tokens. Loads run ahead over the ends of tiles, and
over the end of the kernel before: what is loaded first is a weight.

A stage holds a block of 128 of K: 128 rows of the weight, the tokens and their scales. Its product is scaled and added
in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baleen.kernels import pdl, pdl_gluon
from baleen.kernels.fp8_experts.layout import MASKED_TOKENS

BLOCK = gl.constexpr(128)  # of K, and of the scales
HALF = gl.constexpr(64)  # rows of the weight in one product
TILE = gl.constexpr(128)  # rows of the weight in a tile, a half for each group
ROOM = gl.constexpr(MASKED_TOKENS)
BOX = gl.constexpr(16)  # tokens that are loaded together
STAGES = gl.constexpr(6)  # of 32.5 KiB

_BYTES = gl.NVMMASharedLayout(128, 8, 2)
_SCALES = gl.NVMMASharedLayout(0, 32, 2)


def can_run(weight: Tensor) -> bool:
    """The kernel runs on this device, whose dims `triton_kernel.can_run` has looked at."""
    return weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] == 9


def multiply(values: Tensor, scale: Tensor, counts: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> None:
    """out[row] = values[row] times the weight of the row's expert: e for rows ROOM * e to ROOM * e + counts[e].

    values  float8_e4m3fn [ROOM * E, K], scale float32 [E, K/128, ROOM]; counts int32 [E]
    weight  float8_e4m3fn [E, N, K], weight_scale float32 [E, N/128, K/128]; N and K multiples of 128
    out     bfloat16 or float32 [ROOM * E, N]; the other rows stay as they are
    """
    num_experts, num_rows, dim = weight.shape
    rows, blocks = weight.flatten(0, 1), scale.flatten(0, 1)
    _stream[(min(num_experts * num_rows // TILE.value, _num_sms(out.device)),)](
        TensorDescriptor(values, list(values.shape), list(values.stride()), [BOX.value, BLOCK.value], _BYTES),
        TensorDescriptor(blocks, list(blocks.shape), list(blocks.stride()), [1, ROOM.value], _SCALES),
        TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [HALF.value, BLOCK.value], _BYTES),
        weight_scale,
        counts,
        out,
        SHAPE=(num_experts, num_rows, dim),
        num_warps=4,
        **pdl.launch(values),
    )


@lru_cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.constexpr_function
def _product_layout(tokens):  # type: ignore[no-untyped-def]
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 32])


@gluon.constexpr_function
def _store_layout(tokens):  # type: ignore[no-untyped-def]
    """The rows of _product_layout in the same warps; a thread has eight of a token next to each other."""
    columns = [[0, 16 << i] for i in range((tokens // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [4, 0], *columns],
        [[8, 0], [0, 1], [0, 2], [0, 4], [0, 8]],
        [[16, 0], [32, 0]],
        [],
        [64, tokens],
    )


@gluon.constexpr_function
def _num_tiles(shape):  # type: ignore[no-untyped-def]
    """Of all experts."""
    return shape[0] * shape[1] // 128


@gluon.jit
def _tile(index, SHAPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """(expert, first row). The last expert comes first: if it has every token, as a shared one has, its tiles take
    longest. Expert 0 past the end.
    """
    EACH: gl.constexpr = SHAPE[1] // TILE
    return gl.maximum(SHAPE[0] - 1 - index // EACH, 0), index % EACH * TILE


@gluon.jit
def _following(stage, phase):  # type: ignore[no-untyped-def]
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _load_weight(weight, counts, buffers, barriers, SHAPE: gl.constexpr, PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    BLOCKS: gl.constexpr = SHAPE[2] // BLOCK
    AHEAD: gl.constexpr = min(BLOCKS, STAGES)
    start = gl.program_id(0)
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    # Of the first tile, whether or not its expert has a row: how many it has a kernel before may still write.
    stage, phase = _load_blocks(weight, buffers, barriers, stage, phase, start, 0, AHEAD, SHAPE)
    pdl_gluon.wait(PDL)
    stage, phase = _load_blocks(weight, buffers, barriers, stage, phase, start, AHEAD, BLOCKS, SHAPE)
    for index in range(start + gl.num_programs(0), _num_tiles(SHAPE), gl.num_programs(0)):
        if gl.load(counts + _tile(index, SHAPE)[0]) > 0:
            stage, phase = _load_blocks(weight, buffers, barriers, stage, phase, index, 0, BLOCKS, SHAPE)


@gluon.jit
def _load_blocks(  # type: ignore[no-untyped-def]
    weight, buffers, barriers, stage, phase, index, first, last, SHAPE: gl.constexpr
):
    _, _, buffer = buffers
    full, empty = barriers
    expert, row = _tile(index, SHAPE)
    for block in range(first, last):
        mbarrier.wait(empty.index(stage), phase)
        barrier = full.index(stage)
        mbarrier.expect(barrier, TILE * BLOCK)
        for half in gl.static_range(2):
            place = [expert * SHAPE[1] + row + half * HALF, block * BLOCK]
            tma.async_copy_global_to_shared(weight, place, barrier, buffer.index(stage * 2 + half))
        stage, phase = _following(stage, phase)
    return stage, phase


@gluon.jit
def _load_tokens(  # type: ignore[no-untyped-def]
    x, x_scale, counts, buffers, barriers, SHAPE: gl.constexpr, PDL: gl.constexpr
):
    BLOCKS: gl.constexpr = SHAPE[2] // BLOCK
    full, empty = barriers
    pdl_gluon.wait(PDL)
    pdl_gluon.let_next_start(PDL)
    start = gl.program_id(0)
    stage, phase = 0, 1
    following = gl.load(counts + _tile(start, SHAPE)[0])
    for index in range(start, _num_tiles(SHAPE), gl.num_programs(0)):
        expert, _ = _tile(index, SHAPE)
        boxes = gl.cdiv(following, BOX)
        following = gl.load(counts + _tile(index + gl.num_programs(0), SHAPE)[0])
        if (boxes > 0) | (index == start):
            for block in range(BLOCKS):
                mbarrier.wait(empty.index(stage), phase)
                barrier = full.index(stage)
                if boxes <= 2:
                    _load_boxes(x, x_scale, buffers, barrier, stage, expert, boxes, block, BLOCKS, 2)
                else:
                    _load_boxes(x, x_scale, buffers, barrier, stage, expert, boxes, block, BLOCKS, ROOM // BOX)
                stage, phase = _following(stage, phase)


@gluon.jit
def _load_boxes(  # type: ignore[no-untyped-def]
    x, x_scale, buffers, barrier, stage, expert, boxes, block, BLOCKS: gl.constexpr, MOST: gl.constexpr
):
    x_buffer, scale_buffer, _ = buffers
    for loaded in gl.static_range(MOST + 1):  # the number of bytes must be a constant
        mbarrier.expect(barrier, ROOM * 4 + loaded * (BOX * BLOCK), pred=boxes == loaded)
    tma.async_copy_global_to_shared(x_scale, [expert * BLOCKS + block, 0], barrier, scale_buffer.index(stage))
    for box in gl.static_range(MOST):
        place = [expert * ROOM + box * BOX, block * BLOCK]
        buffer = x_buffer.index(stage * (ROOM // BOX) + box)
        tma.async_copy_global_to_shared(x, place, barrier, buffer, pred=box < boxes)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    factors, buffers, barriers, stage, phase,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, HALVES: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Sums [64, TOKENS / HALVES] over the blocks of K, of one or two halves of the tokens: with two, one is scaled and
    added while the other is multiplied. factors: the weight's scales of these rows, one a block.
    """
    x_buffer, scale_buffer, weight_buffer = buffers
    full, empty = barriers
    WIDTH: gl.constexpr = TOKENS // HALVES
    layout: gl.constexpr = _product_layout(WIDTH)
    rooms = x_buffer._reinterpret(gl.float8e4nv, [STAGES, ROOM, BLOCK], x_buffer.layout)
    zero = gl.zeros([HALF, WIDTH], gl.float32, layout=layout)
    total, other_total = zero, zero
    factor = gl.load(factors)
    for block in range(BLOCKS):
        following = gl.load(factors + gl.minimum(block + 1, BLOCKS - 1))  # on its way while this one is multiplied
        mbarrier.wait(full.index(stage), phase)
        weights, tokens, scales = weight_buffer.index(stage * 2 + GROUP), rooms.index(stage), scale_buffer.index(stage)
        x = tokens.slice(0, WIDTH).permute((1, 0))
        product = warpgroup_mma(weights, x, zero, use_acc=False, is_async=True)
        scale = scales.slice(0, WIDTH, dim=1).load(layout) * factor
        if HALVES == 1:
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            total += product * scale
        else:
            x = tokens.slice(WIDTH, WIDTH).permute((1, 0))
            other = warpgroup_mma(weights, x, zero, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(1, deps=(product,))
            total += product * scale
            scale = scales.slice(WIDTH, WIDTH, dim=1).load(layout) * factor
            other = warpgroup_mma_wait(0, deps=(other,))
            mbarrier.arrive(empty.index(stage), count=1)
            other_total += other * scale
        factor = following
        stage, phase = _following(stage, phase)
    return total, other_total, stage, phase


@gluon.jit
def _multiply_tile(  # type: ignore[no-untyped-def]
    weight_scale, out, buffers, barriers, stage, phase, index, count,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, HALVES: gl.constexpr, SHAPE: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = SHAPE[2] // BLOCK
    WIDTH: gl.constexpr = TOKENS // HALVES
    expert, row = _tile(index, SHAPE)
    factors = weight_scale + (expert * (SHAPE[1] // 128) + row // 128) * BLOCKS
    total, other_total, stage, phase = _multiply(
        factors, buffers, barriers, stage, phase, GROUP, TOKENS, HALVES, BLOCKS
    )
    row += GROUP * HALF
    _store(out, total, expert, row, 0, count, WIDTH, SHAPE[1])
    if HALVES == 2:
        _store(out, other_total, expert, row, WIDTH, count, WIDTH, SHAPE[1])
    return stage, phase


@gluon.jit
def _store(  # type: ignore[no-untyped-def]
    out, total, expert, row, first, count, TOKENS: gl.constexpr, NUM_ROWS: gl.constexpr
):
    """Sums of 64 rows of the weight and the tokens from `first` on. The weight's rows are the result's columns."""
    layout: gl.constexpr = _store_layout(TOKENS)
    result = gl.convert_layout(total.to(out.dtype.element_ty), layout)
    rows = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    offset = (expert * ROOM + token).to(gl.int64) * NUM_ROWS
    gl.store(out + offset[None, :] + rows[:, None], result, mask=(token < count)[None, :])


@gluon.jit
def _compute(  # type: ignore[no-untyped-def]
    weight_scale, counts, out, buffers, barriers, GROUP: gl.constexpr, SHAPE: gl.constexpr, PDL: gl.constexpr
):
    pdl_gluon.wait(PDL)
    start = gl.program_id(0)
    stage, phase = 0, 0
    following = gl.load(counts + _tile(start, SHAPE)[0])
    for index in range(start, _num_tiles(SHAPE), gl.num_programs(0)):
        count = following
        following = gl.load(counts + _tile(index + gl.num_programs(0), SHAPE)[0])
        if (count > 0) | (index == start):
            if count <= 32:
                stage, phase = _multiply_tile(
                    weight_scale, out, buffers, barriers, stage, phase, index, count, GROUP, 32, 1, SHAPE
                )
            elif count <= 64:
                stage, phase = _multiply_tile(
                    weight_scale, out, buffers, barriers, stage, phase, index, count, GROUP, 64, 1, SHAPE
                )
            else:
                stage, phase = _multiply_tile(
                    weight_scale, out, buffers, barriers, stage, phase, index, count, GROUP, 128, 2, SHAPE
                )


@gluon.jit
def _stream(  # type: ignore[no-untyped-def]
    x, x_scale, weight, weight_scale, counts, out, SHAPE: gl.constexpr, PDL: gl.constexpr
):
    """SHAPE: of the weight, (E, N, K)."""
    x_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * (ROOM // BOX), BOX, BLOCK], x.layout)
    scale_buffer = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROOM], x_scale.layout)
    weight_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, HALF, BLOCK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)  # what is loaded of the weight, and of the tokens
        mbarrier.init(empty.index(stage), count=2)  # both groups
    fence_async_shared()
    buffers = (x_buffer, scale_buffer, weight_buffer)
    barriers = (full, empty)
    gl.warp_specialize(
        [
            (_compute, (weight_scale, counts, out, buffers, barriers, gl.constexpr(0), SHAPE, PDL)),
            (_compute, (weight_scale, counts, out, buffers, barriers, gl.constexpr(1), SHAPE, PDL)),
            (_load_weight, (weight, counts, buffers, barriers, SHAPE, PDL)),
            (_load_tokens, (x, x_scale, counts, buffers, barriers, SHAPE, PDL)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
