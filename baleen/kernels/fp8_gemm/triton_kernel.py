"""FP8 linear layers of few rows in Triton, for Hopper and newer: K is split over programs, so that all of the GPU
streams the weight whatever its shape.

The weight is the left side of each product and the activations the right one, since the tensor cores' left side has 64
rows at least: so few tokens waste little. A block of 128 of K is one product, whose result is scaled and added in
float32. The last program of a tile to finish adds the partial sums of all, in order of K: the result does not depend on
who was last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baleen.kernels import pdl
from baleen.kernels.fp8_gemm import reference
from baleen.kernels.fp8_quant import Quantized

BLOCK = 128  # of K, and of N in the weight's scales
MOST_ROWS = 128  # beyond, other kernels are limited by arithmetic, which this one was not written for
_COUNTERS = 1 << 16
_PROCESSORS = 132  # multiprocessors of an H100 or H200


class Config(NamedTuple):
    """block_m, block_n: rows of x and of the weight in a tile (block_m 16 to 128, block_n 64 to 256, powers of two);
    splits: programs that share K; stages: blocks of K in flight and in use; pdl: start while the previous kernel of the
    stream ends, and fetch the weight meanwhile.
    """

    block_m: int
    block_n: int
    splits: int
    stages: int = 4
    warps: int = 4
    pdl: bool = False


class Counters:
    """Zeros that the kernel leaves as zeros. Calls take them in turn, so that products which run at the same time, on
    two streams, have different ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.zeros = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self.no_partial = torch.empty(1, device=device)
        self.next = 0

    def take(self, count: int) -> Tensor:
        """At least `count` of them."""
        start = self.next if self.next + count <= _COUNTERS else 0
        self.next = start + count
        return self.zeros[start:]


_counters: dict[torch.device, Counters] = {}


def counters_of(device: torch.device) -> Counters:
    """The device's, of all kernels that split K."""
    shared = _counters.get(device)
    if shared is None:
        shared = _counters[device] = Counters(device)
    return shared


def takes(num_tokens: int, num_rows: int, num_cols: int) -> bool:
    """True for the shapes that the kernel is for, of x [num_tokens, num_cols] and weight [num_rows, num_cols]."""
    return num_cols % BLOCK == 0 and num_tokens <= MOST_ROWS


def fp8_gemm(
    x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    num_rows, num_cols = weight.shape
    num_tokens = x.values.shape[0]
    if not takes(num_tokens, num_rows, num_cols) or not _fits(x, weight, weight_scale_inv):
        return reference.fp8_gemm(x, weight, weight_scale_inv, dtype)
    out = torch.empty(num_tokens, num_rows, dtype=dtype, device=x.values.device)
    if not out.numel():
        return out
    block_m, block_n, splits, stages, warps, early = config or default_config(num_tokens, num_rows, num_cols)
    tiles, token_tiles = triton.cdiv(num_rows, block_n), triton.cdiv(num_tokens, block_m)
    shared = counters_of(out.device)
    counters, partial = shared.zeros, shared.no_partial
    options = pdl.launch(out, early)
    if splits > 1:
        counters = shared.take(tiles * token_tiles)
        partial = torch.empty(splits, num_tokens, num_rows, dtype=torch.float32, device=out.device)
        if warps == 4:
            # Else the compiler saves registers, and the last program's loads of partial sums wait for each other.
            options["maxnreg"] = 168
    values = block_m * block_n // (32 * warps)  # of a tile, in each thread
    _split_k[(token_tiles, tiles, splits)](
        TensorDescriptor(x.values, [num_tokens, num_cols], [x.values.stride(0), 1], [block_m, BLOCK]),
        x.scale,
        TensorDescriptor(weight, [num_rows, num_cols], [num_cols, 1], [block_n, BLOCK]),
        weight,
        weight_scale_inv,
        out,
        partial,
        counters,
        num_tokens,
        num_rows,
        num_cols // BLOCK,
        x.scale.stride(0),
        x.scale.stride(1),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        UNROLL=8 if values <= 16 else max(64 // values, 1),
        EARLY=early,
        num_warps=warps,
        **options,
    )
    return out


def _fits(x: Quantized, weight: Tensor, weight_scale_inv: Tensor) -> bool:
    """True if these lie as bulk tensor copies want them, on a device that has such copies."""
    num_rows, num_cols = weight.shape
    values = x.values
    return (
        (triton.knobs.runtime.interpret or (values.is_cuda and has_bulk_copies(values.get_device())))
        and values.dim() == 2
        and values.stride(1) == 1
        and values.stride(0) % 16 == 0
        and not (values.data_ptr() | weight.data_ptr()) % 16
        and weight.is_contiguous()
        and weight_scale_inv.is_contiguous()
        and weight_scale_inv.shape == (triton.cdiv(num_rows, BLOCK), num_cols // BLOCK)
    )


_capabilities: dict[int, bool] = {}


def has_bulk_copies(device: int) -> bool:
    """True for a device, by its number, that copies tiles by descriptor: Hopper and newer."""
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)[0] >= 9
    return _capabilities[device]


def default_config(num_tokens: int, num_rows: int, num_cols: int) -> Config:
    """One wave of programs: as many as fit on the GPU at a time, each with 64 KiB of the weight at least."""
    block_m = min(max(triton.next_power_of_2(num_tokens), 16), 128)
    token_tiles = triton.cdiv(num_tokens, block_m)
    blocks = num_cols // BLOCK
    small = block_m == 16 and num_rows * num_cols < 24 << 20
    block_n = 64 if small else 128
    programs = _PROCESSORS * (4 if small else 3 if block_m == 16 else 2)
    tiles = triton.cdiv(num_rows, block_n) * token_tiles
    splits = max(min(programs // tiles, blocks * block_n // 512), 1)
    return Config(block_m, block_n, splits, 3 if block_m == 128 else 4, 8 if block_m == 128 else 4)


# Compiled once for all shapes: neither their divisibility nor a 1 is worth another compilation.
@triton.jit(do_not_specialize=["counters", "num_tokens", "num_blocks", "scale_column"])
def _split_k(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    weight,
    weight_pointer,
    weight_scale,
    out,
    partial,
    counters,
    num_tokens,
    num_rows,
    num_blocks,
    scale_row,
    scale_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the transposed result over one of the parts of K. Grid: tokens, rows, parts.

    x, weight         descriptors of [num_tokens, K] and [num_rows, K], K = 128 * num_blocks; rows beyond read as zeros
    partial           float32 [parts, num_tokens, num_rows] if there are several parts
    counters          int32 zeros, one a tile, likewise
    scale_row, scale_column   strides of x_scale
    """
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    first_m, first_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    begin, end = split * num_blocks // num_splits, (split + 1) * num_blocks // num_splits
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if EARLY:
        _prefetch(weight_pointer, n, num_rows, num_blocks, begin, end, STAGES)
    pdl.begin(PDL)
    token_scale = x_scale + m * scale_row
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        left = weight.load([first_n, block * 128])
        right = x.load([first_m, block * 128])
        scale = tl.load(token_scale + block * scale_column, mask=m < num_tokens, other=0.0)
        product = tl.dot(left, right.T)
        if BLOCK_N <= 128:
            scale *= tl.load(weight_scale + first_n // 128 * num_blocks + block)
            total += product * scale[None, :]
        else:
            row = tl.minimum(n, num_rows - 1) // 128
            total += product * tl.load(weight_scale + row * num_blocks + block)[:, None] * scale[None, :]
    valid = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
    offset = m[None, :] * num_rows + n[:, None]
    if num_splits == 1:
        tl.store(out + offset, total.to(out.dtype.element_ty), mask=valid)
    else:
        part = num_tokens.to(tl.int64) * num_rows
        tl.store(partial + split * part + offset, total, mask=valid)
        # All threads' stores come before this one's addition, and that before the reads of who sees the last count.
        tl.debug_barrier()
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for start in range(0, num_splits, UNROLL):
                for step in tl.static_range(UNROLL):
                    source = partial + (start + step) * part + offset
                    here = valid & (start + step < num_splits)
                    total += tl.load(source, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(out + offset, total.to(out.dtype.element_ty), mask=valid)
            tl.store(counter, 0)


@triton.jit
def _prefetch(weight, n, num_rows, num_blocks, begin, end, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Asks for the first blocks of this program's part of the weight, to the L2 cache."""
    row = weight + tl.minimum(n, num_rows - 1).to(tl.int64) * num_blocks * 128
    for stage in tl.static_range(STAGES - 1):
        source = row + tl.minimum(begin + stage, end - 1) * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [source], dtype=tl.int32, is_pure=False, pack=1
        )
