"""1x128 quantisation in Triton, and the arithmetic of one block for the kernels that quantise what they compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_quant import Quantized, empty_scale, reference
from baleen.kernels.fp8_quant.reference import BLOCK

# Blocks of a program and its warps, by how many programs of them a launch has. A warp holds two blocks at a time, 16
# bytes of bfloat16 a thread; more of them a thread are more loads in flight, fewer are more multiprocessors at work.
_FEW, _SOME, _MANY = (2, 1), (8, 4), (16, 4)
_NUM_PROGRAMS = 264  # two for each multiprocessor


def tile_of(num_blocks: int) -> tuple[int, int]:
    """Blocks of a program, warps of a program for elementwise work on so many blocks of 128."""
    if num_blocks <= _NUM_PROGRAMS * _FEW[0]:
        return _FEW
    return _SOME if num_blocks <= 16 * _NUM_PROGRAMS * _SOME[0] else _MANY


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [T, D], contiguous along D; a view where strides allow it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def can_run(x: Tensor) -> bool:
    """x is where Triton's kernels run, of a dtype they take, and not empty."""
    runs = x.is_cuda or triton.knobs.runtime.interpret
    return runs and x.dtype in (torch.bfloat16, torch.float32) and x.numel() > 0


def empty_quantized(shape: torch.Size, device: torch.device) -> Quantized:
    """Values [..., K] contiguous, scale [..., ceil(K/128)] column-major over all rows."""
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    num_blocks = -(-shape[-1] // BLOCK)
    scale = empty_scale(values.numel() // shape[-1], num_blocks, device)
    return Quantized(values, scale if len(shape) == 2 else scale.view(*shape[:-1], num_blocks))


def quantize_1x128(x: Tensor) -> Quantized:
    if not can_run(x):
        return reference.quantize_1x128(x)
    rows = rows_of(x)
    num_rows, dim = rows.shape
    out = empty_quantized(x.shape, x.device)
    num_blocks = num_rows * -(-dim // BLOCK)
    blocks, num_warps = tile_of(num_blocks)
    _quantize[(triton.cdiv(num_blocks, blocks),)](
        rows,
        out.values,
        out.scale,
        num_blocks,
        rows.stride(0),
        column_stride(num_rows),
        DIM=dim,
        BLOCKS=blocks,
        num_warps=num_warps,
        **pdl.launch(rows),
    )
    return out


def column_stride(num_rows: int) -> int:
    """From one block's scales to the next's in empty_scale's tensor, whatever leading dims it was given since."""
    return -(-num_rows // 4) * 4


@triton.jit
def quantize_blocks(x):  # type: ignore[no-untyped-def]
    """x [N, 128] float32 -> e4m3 [N, 128], scale [N] float32.

    In the bits, where the largest is also NaN's if there is one: the scale's exponent is amax's less 8, and one more
    if its mantissa is above 448's, which is 1.75.
    """
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (tl.maximum(amax, 0x38D1B717) + 0x1FFFFF) >> 23  # at least that of 1e-4
    finite = amax < 0x7F800000
    scale = tl.where(finite, (exponent - 8) << 23, 0x7F800000).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (254 + 8 - exponent) << 23, 0).to(tl.float32, bitcast=True)
    return (x * inverse[:, None]).to(tl.float8e4nv), scale


@triton.jit
def store_quantized(  # type: ignore[no-untyped-def]
    x, values, scale, block, columns, scale_stride, DIM: tl.constexpr
):
    """Quantises x [N, 128] float32 and stores it: block [N] of their rows, columns [N, 128] in their rows.

    values  pointer to e4m3, the start of the row: one, or [N, 1]
    scale   pointer to the row's first scale: one, or [N]
    """
    quantized, factor = quantize_blocks(x)
    # By eights: by sixteens, the widest store, the compiler would give each thread 16 neighbouring values all through,
    # with gaps between the 16 bytes of bfloat16 that a warp loads at once, or an exchange through shared memory.
    tl.store(tl.max_contiguous(values + columns, (1, 8)), quantized, mask=columns < DIM)
    tl.store(scale + block * scale_stride, factor, mask=block * 128 < DIM)


@triton.jit(do_not_specialize=["num_blocks", "scale_stride"])
def _quantize(  # type: ignore[no-untyped-def]
    x, values, scale, num_blocks, x_stride, scale_stride, DIM: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr
):
    """BLOCKS runs of 128, in the order of the rows. x [T, DIM] of stride x_stride, values [T, DIM] contiguous."""
    row, block, columns = block_columns(tl.program_id(0) * BLOCKS, num_blocks, DIM, BLOCKS)
    pdl.begin(PDL)
    run = tl.load(x + row[:, None] * x_stride + columns, mask=columns < DIM, other=0.0).to(tl.float32)
    store_quantized(run, values + row[:, None] * DIM, scale + row, block, columns, scale_stride, DIM)


@triton.jit
def block_columns(first, num_blocks, DIM: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks first, first + 1, ... of rows of DIM: their row [BLOCKS] int64, place in it [BLOCKS] and columns
    [BLOCKS, 128]. What does not exist has a column from DIM on."""
    PER_ROW: tl.constexpr = (DIM + 127) // 128
    index = first + tl.arange(0, BLOCKS)
    row, block = index // PER_ROW, index % PER_ROW
    block = tl.where(index < num_blocks, block, PER_ROW)
    columns = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    return row.to(tl.int64), block, columns
