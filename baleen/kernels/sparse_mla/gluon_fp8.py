"""Sparse MLA over FP8 rows on Hopper, in Gluon: a program attends 64 heads of one token to its selected rows, or to a
part of them, with a group of four warps for each of three tasks.

rows   fetches 64 rows at a time, through registers and a tile ahead, and writes them as bfloat16 into shared memory:
       K in all 576 columns, V in the first 512
left   scores, softmax, and the left half of the weighted sum, 64 x 256 float32 in registers
right  the right half, with weights and factors that `left` leaves in shared memory

Shared memory holds the queries (72 KiB) and two tiles (72 KiB each). Tiles go by pairs: the scores of the second are
computed, and their softmax, while the first is added up, and the first of the next pair is written while the second is.
A tile's weights take the place of its rope part, which is read no more by then.

Before the tensor cores read what threads wrote to shared memory there is a fence: where `left` writes weights, and,
for the tiles, where `left` has waited for them. Where they are written it would wait for all that `rows` loads ahead.
What `right` reads of a tile comes after: the weights are its permission.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from baleen.kernels import pdl_gluon
from baleen.kernels.sparse_mla.gluon_rows import dequantize, load_index

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(64)
LATENT = gl.constexpr(512)
ROPE = gl.constexpr(64)
HALF = gl.constexpr(256)  # columns of the queries, and of V, in one product
WORDS = gl.constexpr(32)  # 4-byte words of FP8 values that have one scale
BLOCKS = gl.constexpr(4)  # scales of a row
PRODUCTS = gl.constexpr(3)  # that make up the scores of a tile
NUM_WARPS = 4  # of each group

# 16 bytes a thread. FP8: 4 threads have 64 values of a row; as bfloat16, half of what two rows have fills the banks.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
COPY_COLUMNS = gl.constexpr(gl.SliceLayout(0, COPY.value))
PACKED = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
PACKED_ROWS = gl.constexpr(gl.SliceLayout(1, PACKED.value))
PACKED_COLUMNS = gl.constexpr(gl.SliceLayout(0, PACKED.value))
PAIRS = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))  # the same rows as PACKED
PAIR_ROWS = gl.constexpr(gl.SliceLayout(1, PAIRS.value))
PAIR_COLUMNS = gl.constexpr(gl.SliceLayout(0, PAIRS.value))
LIST = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SCORE_HEADS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORE_KEYS = gl.constexpr(gl.SliceLayout(0, SCORES.value))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SUM_HEADS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
SUM_COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS.value))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
WORD_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # the same bytes as TILE
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def attend(  # type: ignore[no-untyped-def]
    q, values, scales, rope, indices, out, sums, maxima, totals, num_selected, num_heads, per_part, scale_log2,
    q_token, q_head, out_token, out_head, index_token,
    ROW: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (token and block of heads, part): the token's indices from part * per_part on. Rows lie ROW bytes apart:
    values e4m3, as int32 words, 4 scales float32, rope bfloat16. scale_log2: the softmax scale times log2(e). Writes
    out or, with SPLIT, what is to be added up: sums float32 [T, parts, H, 512] before the division, the largest scores
    and the totals [T, parts, H].
    """
    pdl_gluon.wait(PDL)
    pdl_gluon.let_next_start(PDL)
    blocks = (num_heads + HEADS - 1) // HEADS
    token = gl.cast(gl.program_id(0) // blocks, gl.int64)
    head = gl.program_id(0) % blocks * HEADS
    begin = gl.program_id(1) * per_part
    end = gl.minimum(begin + per_part, num_selected)
    chosen = indices + token * index_token
    num_pairs = _num_pairs(chosen, begin, end)

    queries = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, HALF], TILE)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], TILE)
    words = gl.allocate_shared_memory(gl.int32, [2 * 2, KEYS, HALF // 2], WORD_TILE)
    latents = words._reinterpret(gl.bfloat16, [2 * 2, KEYS, HALF], TILE)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], TILE)
    hidden = gl.allocate_shared_memory(gl.float32, [2, KEYS], FLAT)
    factors = gl.allocate_shared_memory(gl.float32, [2, HEADS], FLAT)
    total = gl.allocate_shared_memory(gl.float32, [HEADS], FLAT)
    written = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    totalled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for tile in gl.static_range(2):
        mbarrier.init(written.index(tile), count=1)
        mbarrier.init(weighted.index(tile), count=1)
        mbarrier.init(read.index(tile), count=2)
    mbarrier.init(totalled, count=1)
    fence_async_shared()

    tiles = (latents, ropes, hidden)
    left_to_right = (factors, total)
    barriers = (written, weighted, read, totalled)
    place = (token, head, num_heads)
    result = (out, sums, out_token, out_head)
    query = q + token * q_token, q_head, queries, query_rope
    parts = maxima, totals
    gl.warp_specialize(
        [
            (_left, (query, tiles, left_to_right, barriers, place, result, parts, num_pairs, scale_log2, SPLIT)),
            (_right, (tiles, left_to_right, barriers, place, result, num_pairs, SPLIT, PDL)),
            (_rows, (values, scales, rope, chosen, begin, end, words, ropes, hidden, barriers, num_pairs, ROW, PDL)),
        ],
        [4, 4],
        [160, 120],
    )  # fmt: skip


@gluon.jit
def _num_pairs(chosen, begin, end):  # type: ignore[no-untyped-def]
    """Pairs of tiles up to the last index that is one; at least 1."""
    offsets = gl.arange(0, 1024, layout=LIST)
    last = begin
    for start in range(begin, end, 1024):
        position = start + offsets
        index = load_index(chosen, position, end)
        last = gl.maximum(last, gl.max(gl.where(index >= 0, position + 1, begin), axis=0))
    return gl.maximum((last - begin + 2 * KEYS - 1) // (2 * KEYS), 1)


@gluon.jit
def _rows(  # type: ignore[no-untyped-def]
    values, scales, rope, chosen, begin, end, words, ropes, hidden, barriers, num_pairs,
    ROW: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    pdl_gluon.wait(PDL)
    written, _, read, _ = barriers
    rows = begin + gl.arange(0, KEYS, layout=PACKED_ROWS)
    line = begin + gl.arange(0, KEYS, layout=LINE)
    index = load_index(chosen, rows, end)
    seen = load_index(chosen, line, end)
    scale_0, scale_1, scale_2, scale_3 = _load_scales(scales, index, ROW)
    words_0 = _load_block(values, index, 0, ROW)
    words_1 = _load_block(values, index, 1, ROW)
    words_2 = _load_block(values, index, 2, ROW)
    words_3 = _load_block(values, index, 3, ROW)
    following = load_index(chosen, rows + KEYS, end)
    for tile in range(num_pairs * 2):
        buffer = tile & 1
        mbarrier.wait(read.index(buffer), (tile >> 1) & 1 ^ 1)
        pairs = gl.convert_layout(index, PAIR_ROWS, assert_trivial=True)
        source = (pairs.to(gl.int64) * (ROW // 2))[:, None] + gl.arange(0, ROPE, layout=PAIR_COLUMNS)[None, :]
        async_copy.async_copy_global_to_shared(ropes.index(buffer), rope + source, mask=(pairs >= 0)[:, None])
        async_copy.commit_group()
        hidden.index(buffer).store(gl.where(seen >= 0, 0.0, -float("inf")))
        index = following
        _write(words_0, scale_0, words, buffer, 0)
        words_0 = _load_block(values, index, 0, ROW)
        _write(words_1, scale_1, words, buffer, 1)
        words_1 = _load_block(values, index, 1, ROW)
        _write(words_2, scale_2, words, buffer, 2)
        words_2 = _load_block(values, index, 2, ROW)
        _write(words_3, scale_3, words, buffer, 3)
        words_3 = _load_block(values, index, 3, ROW)
        scale_0, scale_1, scale_2, scale_3 = _load_scales(scales, index, ROW)
        following = load_index(chosen, rows + (tile + 2) * KEYS, end)
        seen = load_index(chosen, line + (tile + 1) * KEYS, end)
        async_copy.wait_group(0)
        gl.thread_barrier()
        mbarrier.arrive(written.index(buffer), count=1)


@gluon.jit
def _load_block(values, index, block, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of 64 rows what has one scale: [KEYS, 32], 4 codes each; zeros where no index is."""
    row = index.to(gl.int64) * (ROW // 4)
    source = values + (row[:, None] + (block * WORDS + gl.arange(0, WORDS, layout=PACKED_COLUMNS))[None, :])
    return gl.load(source, mask=(index >= 0)[:, None], other=0)


@gluon.jit
def _load_scales(scales, index, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """Those of 64 rows, one [KEYS] for each block; zeros where no index is."""
    row = index.to(gl.int64) * (ROW // 4)
    source = scales + (row[:, None] + gl.arange(0, BLOCKS, layout=PACKED_COLUMNS)[None, :])
    loaded = gl.load(source, mask=(index >= 0)[:, None], other=0.0)
    even, odd = gl.split(gl.reshape(loaded, [KEYS, 2, 2]))
    scale_0, scale_2 = gl.split(even)
    scale_1, scale_3 = gl.split(odd)
    return _as_rows(scale_0), _as_rows(scale_1), _as_rows(scale_2), _as_rows(scale_3)


@gluon.jit
def _as_rows(x):  # type: ignore[no-untyped-def]
    return gl.convert_layout(x, PACKED_ROWS, assert_trivial=True)


@gluon.jit
def _write(words, scale, tiles, buffer, BLOCK: gl.constexpr):  # type: ignore[no-untyped-def]
    """A block as bfloat16 into its columns of a tile."""
    factor = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [scale * 1.329227995784916e36], dtype=gl.int32, is_pure=True, pack=1
    )  # 2^120
    low, high = dequantize(words, factor[:, None])
    half = tiles.index(buffer * 2 + BLOCK // 2)
    half.slice(BLOCK % 2 * WORDS * 2, WORDS * 2, dim=1).store(gl.reshape(gl.join(low, high), [KEYS, WORDS * 2]))


@gluon.jit
def _left(  # type: ignore[no-untyped-def]
    query, tiles, left_to_right, barriers, place, result, parts, num_pairs, scale_log2, SPLIT: gl.constexpr
):
    q, q_head, queries, query_rope = query
    latents, ropes, hidden = tiles
    factors, total_for_right = left_to_right
    written, _, read, totalled = barriers
    query_tiles = queries, query_rope
    token, head, num_heads = place
    maxima, totals = parts

    heads = head + gl.arange(0, HEADS, layout=COPY_ROWS)
    rows = (heads.to(gl.int64) * q_head)[:, None]
    valid = (heads < num_heads)[:, None]
    columns = gl.arange(0, HALF, layout=COPY_COLUMNS)[None, :]
    for half in gl.static_range(2):
        async_copy.async_copy_global_to_shared(queries.index(half), q + (rows + (half * HALF + columns)), mask=valid)
    columns = LATENT + gl.arange(0, ROPE, layout=COPY_COLUMNS)[None, :]
    async_copy.async_copy_global_to_shared(query_rope, q + (rows + columns), mask=valid)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()

    largest = gl.full([HEADS], -1e30, gl.float32, layout=SCORE_HEADS)
    total = _thread_sums(gl.zeros([HEADS, KEYS], gl.float32, layout=SCORES))
    acc = gl.zeros([HEADS, HALF], gl.float32, layout=SUMS)
    _wait_for_tile(written.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(_scores(queries, query_rope, latents, ropes, 0),))
    p, largest, total, shrink = _softmax(s, hidden.index(0), scale_log2, largest, total)
    for pair in range(num_pairs - 1):
        acc, p, largest, total, shrink = _sum_of_first(
            acc, p, largest, total, shrink, scale_log2, query_tiles, tiles, factors, barriers, pair & 1
        )
        acc = _add(p, latents.index(2), acc, shrink)
        _wait_for_tile(written.index(0), pair & 1 ^ 1)
        s = _scores(queries, query_rope, latents, ropes, 0)
        acc = warpgroup_mma_wait(PRODUCTS, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(read.index(1), count=1)
        s = warpgroup_mma_wait(0, deps=(s,))
        p, largest, total, shrink = _softmax(s, hidden.index(0), scale_log2, largest, total)
    acc, p, largest, total, shrink = _sum_of_first(
        acc, p, largest, total, shrink, scale_log2, query_tiles, tiles, factors, barriers, num_pairs - 1 & 1
    )
    acc = _add(p, latents.index(2), acc, shrink)
    total = gl.sum(total, axis=1)
    total = gl.convert_layout(total, SCORE_HEADS, assert_trivial=True)
    total_for_right.store(total)
    gl.thread_barrier()
    mbarrier.arrive(totalled, count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if SPLIT:
        row = (token * gl.num_programs(1) + gl.program_id(1)) * num_heads
        heads = head + gl.arange(0, HEADS, layout=SCORE_HEADS)
        gl.store(maxima + row + heads, largest, mask=heads < num_heads)
        gl.store(totals + row + heads, total, mask=heads < num_heads)
    total = gl.convert_layout(total, SUM_HEADS, assert_trivial=True)
    _store(result, acc, total, latents.index(0), place, 0, SPLIT)


@gluon.jit
def _sum_of_first(  # type: ignore[no-untyped-def]
    acc, p, largest, total, shrink, scale_log2, query_tiles, tiles, factors, barriers, phase
):
    """Scores of a pair's second tile, then, while the first is added up, their softmax."""
    queries, query_rope = query_tiles
    latents, ropes, hidden = tiles
    written, weighted, read, _ = barriers
    _hand_over(p, shrink, ropes.index(0), factors.index(0), weighted.index(0))
    _wait_for_tile(written.index(1), phase)
    s = _scores(queries, query_rope, latents, ropes, 1)
    acc = _add(p, latents.index(0), acc, shrink)
    s = warpgroup_mma_wait(1, deps=(s,))
    p, largest, total, shrink = _softmax(s, hidden.index(1), scale_log2, largest, total)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    mbarrier.arrive(read.index(0), count=1)
    _hand_over(p, shrink, ropes.index(1), factors.index(1), weighted.index(1))
    return acc, p, largest, total, shrink


@gluon.jit
def _right(  # type: ignore[no-untyped-def]
    tiles, left_to_right, barriers, place, result, num_pairs, SPLIT: gl.constexpr, PDL: gl.constexpr
):
    pdl_gluon.wait(PDL)
    latents, ropes, _ = tiles
    factors, total = left_to_right
    _, weighted, read, totalled = barriers
    acc = gl.zeros([HEADS, HALF], gl.float32, layout=SUMS)
    for tile in range(num_pairs * 2):
        buffer = tile & 1
        mbarrier.wait(weighted.index(buffer), (tile >> 1) & 1)
        acc = acc * factors.index(buffer).load(SUM_HEADS)[:, None]
        acc = warpgroup_mma(ropes.index(buffer), latents.index(buffer * 2 + 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(read.index(buffer), count=1)
    mbarrier.wait(totalled, 0)
    _store(result, acc, total.load(SUM_HEADS), latents.index(1), place, HALF, SPLIT)


@gluon.jit
def _wait_for_tile(written, phase):  # type: ignore[no-untyped-def]
    mbarrier.wait(written, phase)
    fence_async_shared()


@gluon.jit
def _scores(queries, query_rope, latents, ropes, TILE_INDEX: gl.constexpr):  # type: ignore[no-untyped-def]
    """PRODUCTS products under way, as many groups to wait for."""
    # A zero that the compiler does not know: it would compute the addresses of all products once, and spill them.
    zero = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    s = gl.zeros([HEADS, KEYS], gl.float32, layout=SCORES)
    first, tile = latents.index(2 * TILE_INDEX + zero), latents.index(2 * TILE_INDEX + 1 + zero)
    s = warpgroup_mma(queries.index(zero), first.permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(queries.index(1 + zero), tile.permute((1, 0)), s, is_async=True)
    return warpgroup_mma(query_rope, ropes.index(TILE_INDEX + zero).permute((1, 0)), s, is_async=True)


@gluon.jit
def _thread_sums(p):  # type: ignore[no-untyped-def]
    """[HEADS, KEYS] -> [HEADS, lane % 4]: each thread sums what it holds of a row, and asks no other."""
    return gl.sum(gl.sum(gl.reshape(p, [HEADS, KEYS // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def _softmax(s, hidden, scale_log2, largest, total):  # type: ignore[no-untyped-def]
    """A tile's weights, and by what everything so far is to be scaled."""
    s = s * scale_log2 + hidden.load(SCORE_KEYS)[None, :]
    now = gl.maximum(largest, gl.max(s, axis=1))
    p = gl.exp2(s - now[:, None])
    shrink = gl.exp2(largest - now)
    summed = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    total = total * summed[:, None] + _thread_sums(p)
    return p.to(gl.bfloat16), now, total, shrink


@gluon.jit
def _hand_over(p, shrink, target, factors, weighted):  # type: ignore[no-untyped-def]
    """A tile's weights and their factor to the group on the right, once no warp reads what they take the place of."""
    gl.thread_barrier()
    target.store(p)
    factors.store(shrink)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(weighted, count=1)


@gluon.jit
def _add(p, values, acc, shrink):  # type: ignore[no-untyped-def]
    """The sum so far, scaled, and that over a tile: under way."""
    acc = acc * gl.convert_layout(shrink, SUM_HEADS, assert_trivial=True)[:, None]
    return warpgroup_mma(gl.convert_layout(p, WEIGHTS, assert_trivial=True), values, acc, is_async=True)


@gluon.jit
def _store(result, acc, total, staging, place, column, SPLIT: gl.constexpr):  # type: ignore[no-untyped-def]
    """The columns from `column` on. staging: what this group alone has read of a tile, and reads no longer."""
    out, sums, out_token, out_head = result
    token, head, num_heads = place
    if SPLIT:
        row = (token * gl.num_programs(1) + gl.program_id(1)) * num_heads
        heads = head + gl.arange(0, HEADS, layout=SUM_HEADS)
        columns = column + gl.arange(0, HALF, layout=SUM_COLUMNS)
        gl.store(sums + (row + heads)[:, None] * LATENT + columns[None, :], acc, mask=(heads < num_heads)[:, None])
    else:
        acc = acc / gl.where(total > 0, total, 1.0)[:, None]
        staging.store(acc.to(gl.bfloat16))
        gl.thread_barrier()
        heads = head + gl.arange(0, HEADS, layout=COPY_ROWS)
        columns = column + gl.arange(0, HALF, layout=COPY_COLUMNS)
        target = out + token * out_token + heads.to(gl.int64)[:, None] * out_head + columns[None, :]
        gl.store(target, staging.load(COPY), mask=(heads < num_heads)[:, None])
