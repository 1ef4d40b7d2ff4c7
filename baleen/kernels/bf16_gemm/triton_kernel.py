"""Products of few rows in Triton, for Hopper and newer: one launch, in which all of the GPU streams the weight whatever
its shape.

As in `fp8_gemm`, the weight is the left side of each product and the activations the right one, since the tensor cores'
left side has the more rows; where the weight is small, K is split over programs, and the last program of a tile to
finish adds the partial sums of all, in order of K: the result does not depend on who was last.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baleen.kernels import pdl
from baleen.kernels.bf16_gemm import reference
from baleen.kernels.fp8_gemm.triton_kernel import counters_of, has_bulk_copies

MOST_ROWS = 128  # beyond, arithmetic is the limit, which this kernel was not written for
FEW_BYTES = 8 << 20  # of a weight: up to here what a program waits for counts, beyond what the memory gives
_PROCESSORS = 132  # multiprocessors of an H100 or H200
_FEW_PROGRAMS = 64  # take all that the L2 cache gives
_STAGE_BYTES = 160 << 10  # at most, of a multiprocessor's shared memory


class Config(NamedTuple):
    """block_m, block_n, block_k: rows of x and of the weight in a tile, and columns of both in a step (powers of two,
    16 and more, block_k 64 and more); splits: programs that share K; stages: steps in flight and in use; early: start
    while the previous kernel of the stream ends, and fetch the weight meanwhile.
    """

    block_m: int
    block_n: int
    splits: int = 1
    block_k: int = 128
    stages: int = 4
    warps: int = 4
    early: bool = False


def bf16_gemm(x: Tensor, weight: Tensor, config: Config | None = None) -> Tensor:
    if not fits(x, weight):
        return reference.bf16_gemm(x, weight)
    config = config or default_config(x.shape[0], *weight.shape)
    return reference.bf16_gemm(x, weight) if config is None else multiply(x, weight, config)


def multiply(x: Tensor, weight: Tensor, config: Config, largest: Tensor | None = None) -> Tensor:
    """bf16_gemm of what fits. largest: [T, tiles] float32, where to write what is largest of each row's values in each
    tile of config.block_n columns; NaN if one of them is."""
    (num_tokens, num_cols), num_rows = x.shape, weight.shape[0]
    block_m, block_n, splits, block_k, stages, warps, early = config
    out = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=x.device)
    tiles, token_tiles = triton.cdiv(num_rows, block_n), triton.cdiv(num_tokens, block_m)
    shared = counters_of(x.device)
    counters, partial = shared.zeros, shared.no_partial
    options = pdl.launch(out, early)
    if splits > 1:
        counters = shared.take(tiles * token_tiles)
        partial = torch.empty(splits * tiles * token_tiles * block_m * block_n, dtype=torch.float32, device=x.device)
        # Else the compiler saves registers, and the last program's loads wait for each other.
        options["maxnreg"] = 168 if warps == 4 else 255
    _split_k[(token_tiles, tiles, splits)](
        TensorDescriptor(x, [num_tokens, num_cols], [x.stride(0), 1], [block_m, block_k]),
        TensorDescriptor(weight, [num_rows, num_cols], [num_cols, 1], [block_n, block_k]),
        weight,
        out,
        partial,
        counters,
        largest,
        num_tokens,
        num_rows,
        num_cols,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLITS=splits,
        STAGES=stages,
        EARLY=early and options["PDL"],
        num_warps=warps,
        **options,
    )
    return out


def fits(x: Tensor, weight: Tensor) -> bool:
    """True for few rows that lie as bulk tensor copies want them, on a device that has such copies."""
    interpreted = triton.knobs.runtime.interpret
    return (
        (interpreted or (x.is_cuda and has_bulk_copies(x.get_device())))
        # The interpreter multiplies bits of bfloat16 as integers: there float32 stands in for it.
        and x.dtype == weight.dtype == (torch.float32 if interpreted else torch.bfloat16)
        and x.dim() == 2
        and 0 < x.shape[0] <= MOST_ROWS
        and weight.numel() > 0
        and x.stride(1) == 1
        and weight.is_contiguous()
        and not (x.stride(0) | weight.shape[1]) * x.element_size() % 16
        and not (x.data_ptr() | weight.data_ptr()) % 16
    )


@cache
def default_config(num_tokens: int, num_rows: int, num_cols: int) -> Config | None:
    """The fastest measured on an H200, right anywhere; None where torch.mm is."""
    if 2 * num_rows * num_cols <= FEW_BYTES:
        return _small(num_tokens, num_rows, num_cols)
    return _streaming(num_tokens, num_rows, num_cols) if num_tokens <= 64 else None


def _streaming(num_tokens: int, num_rows: int, num_cols: int) -> Config:
    """A large weight: a tile a program, of which a multiprocessor has two, with some 100 KiB of stages each."""
    config = Config(16, 128, 1, 128, 3, 4, True) if num_tokens <= 16 else Config(64, 128, 1, 64, 4, 4, True)
    programs = 2 * _PROCESSORS // triton.cdiv(num_rows, config.block_n)
    return config._replace(splits=_parts(triton.cdiv(num_cols, config.block_k), programs, 8))


def _small(num_tokens: int, num_rows: int, num_cols: int) -> Config:
    """A small weight, read in less time than a launch takes: as many parts as the last program of a tile adds in one
    go, of tiles so large that the L2 cache keeps up, and most of it in flight at once.
    """
    row_tiles = triton.cdiv(num_rows, 64)
    block_m, block_k = (16, 256) if num_tokens <= 16 or row_tiles * triton.cdiv(num_tokens, 16) <= 8 else (32, 128)
    blocks = triton.cdiv(num_cols, block_k)
    splits = _parts(blocks, min(_FEW_PROGRAMS // (row_tiles * triton.cdiv(num_tokens, block_m)), 16), 1)
    stages = max(min(triton.cdiv(blocks, splits) + 1, _STAGE_BYTES // (2 * block_k * (block_m + 64))), 2)
    return Config(block_m, 64, splits, block_k, stages, 4, True)


def _parts(blocks: int, most: int, least_blocks: int) -> int:
    """At most so many parts of at least so many blocks; none that would not make the longest part shorter."""
    splits = max(min(most, blocks // least_blocks), 1)
    return triton.cdiv(blocks, triton.cdiv(blocks, splits))


# Compiled once for all shapes of one configuration: neither their divisibility nor a 1 is worth another compilation.
@triton.jit(do_not_specialize=["counters", "num_tokens"])
def _split_k(  # type: ignore[no-untyped-def]
    x,
    weight,
    weight_pointer,
    out,
    partial,
    counters,
    largest,
    num_tokens,
    num_rows,
    num_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the transposed result over one of the parts of K. Grid: tokens, rows, parts.

    x, weight   descriptors of [num_tokens, num_cols] and [num_rows, num_cols]; what is beyond reads as zeros
    partial     float32 [parts, tiles, BLOCK_M, BLOCK_N] if there are several parts
    counters    int32 zeros, one a tile, likewise
    largest     as of `multiply`, or None
    """
    split = tl.program_id(2)
    first_m, first_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    num_blocks = tl.cdiv(num_cols, BLOCK_K)
    begin, end = split * num_blocks // SPLITS, (split + 1) * num_blocks // SPLITS
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = first_m + in_m, first_n + in_n
    if EARLY:
        _prefetch(weight_pointer, n, num_rows, num_cols, begin, tl.minimum(begin + STAGES, end), BLOCK_K)
    pdl.begin(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        left = weight.load([first_n, block * BLOCK_K])
        right = x.load([first_m, block * BLOCK_K])
        total = tl.dot(left, right.T, total)
    valid = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
    target = out + m[None, :] * num_rows + n[:, None]
    if SPLITS == 1:
        tl.store(target, total, mask=valid)
        _store_largest(largest, total, m, n, num_tokens, num_rows)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part = tl.num_programs(1) * tl.num_programs(0) * (BLOCK_M * BLOCK_N)
        source = partial + tile * (BLOCK_M * BLOCK_N) + in_m[None, :] * BLOCK_N + in_n[:, None]
        tl.store(source + split * part, total)
        # All threads' stores come before this one's addition, and that before the reads of who sees the last count.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(source + other * part, cache_modifier=".cg")
            tl.store(target, total, mask=valid)
            _store_largest(largest, total, m, n, num_tokens, num_rows)
            tl.store(counters + tile, 0)


@triton.jit
def _store_largest(  # type: ignore[no-untyped-def]
    largest, total, m, n, num_tokens, num_rows
):
    """Of each column of a tile, which is a row of the result, the largest value, or NaN."""
    if largest is not None:
        best = tl.reduce(tl.where((n < num_rows)[:, None], total, -float("inf")), 0, _larger)
        tl.store(largest + m * tl.num_programs(1) + tl.program_id(1), best, mask=m < num_tokens)


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _prefetch(  # type: ignore[no-untyped-def]
    weight, n, num_rows, num_cols, begin, end, BLOCK_K: tl.constexpr
):
    """Asks for the first steps of this program's part of the weight, to the L2 cache."""
    line = tl.arange(0, BLOCK_K // 64) * 64  # of 128 bytes
    row = weight + tl.minimum(n, num_rows - 1).to(tl.int64)[:, None] * num_cols
    for block in range(begin, end):
        source = row + tl.minimum(block * BLOCK_K + line, num_cols - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [source], dtype=tl.int32, is_pure=False, pack=1
        )
