"""Sparse MLA on Hopper in Gluon: a program attends 64 heads of one token to its selected rows, or to a part of them.
FP8 rows of more than one tile have kernels of their own, in gluon_fp8.py.

A tile of 64 rows is K in all its 576 columns and V in the first 512: fetched once, read by both products. Shared memory
holds the queries (72 KiB), two tiles (72 KiB each) and the softmax weights of one (8 KiB). While the tensor cores work
on the sum over one tile and the scores of the next, the tile after that arrives with cp.async; FP8 rows come through
registers, where they are dequantised. The sum, 64 x 512 float32, is 128 registers of each thread; a warpgroup has half
of its columns, and of the scores half of the rows.

Writes by threads to shared memory are fenced before a barrier wherever the tensor cores read them next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from baleen.kernels import pdl_gluon
from baleen.kernels.sparse_mla.gluon_rows import dequantize, load_index

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(64)
LATENT = gl.constexpr(512)
ROPE = gl.constexpr(64)
WORDS = gl.constexpr(128)  # 4-byte words of FP8 values in a row
BLOCKS = gl.constexpr(4)  # scales of a row
NUM_WARPS = 8

# 16 bytes a thread. bfloat16: 8 threads have 128 bytes of a row, which fill all banks. FP8: 4 threads have 64 values of
# a row; as bfloat16, half of what two rows have fills the banks.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
COPY_COLUMNS = gl.constexpr(gl.SliceLayout(0, COPY.value))
PACKED = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
PACKED_ROWS = gl.constexpr(gl.SliceLayout(1, PACKED.value))
PACKED_COLUMNS = gl.constexpr(gl.SliceLayout(0, PACKED.value))
PAIRS = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0]))  # the same rows as PACKED
PAIR_ROWS = gl.constexpr(gl.SliceLayout(1, PAIRS.value))
PAIR_COLUMNS = gl.constexpr(gl.SliceLayout(0, PAIRS.value))
LIST = gl.constexpr(gl.BlockedLayout([8], [32], [8], [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SCORE_HEADS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORE_KEYS = gl.constexpr(gl.SliceLayout(0, SCORES.value))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
SUM_HEADS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
SUM_COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS.value))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
WORD_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # the same bytes as TILE


@gluon.jit
def attend(  # type: ignore[no-untyped-def]
    q,
    kv,
    indices,
    out,
    sums,
    maxima,
    totals,
    num_selected,
    num_heads,
    per_part,
    scale_log2,
    q_token,
    q_head,
    out_token,
    out_head,
    index_token,
    ROW: gl.constexpr,
    SPLIT: gl.constexpr,
    HOLD_ROPE: gl.constexpr,
):
    """bfloat16 rows, ROW elements apart. Program (token and block of heads, part): the token's indices from part *
    per_part on. scale_log2: the softmax scale times log2(e). Writes out or, with SPLIT, what is to be added up: sums
    float32 [T, parts, H, 512] before the division, the largest scores and the totals [T, parts, H]. HOLD_ROPE: the
    queries' rope part stays in registers, 16 a thread, which takes a ninth of the queries' reads off shared memory.
    """
    token, head, chosen, begin, end = _share(indices, index_token, num_selected, num_heads, per_part)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [HEADS, LATENT], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], TILE)
    latents = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, LATENT], TILE)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], TILE)
    weights = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], TILE)

    heads = head + gl.arange(0, HEADS, COPY_ROWS)
    _copy_rows(q + token * q_token + heads.to(gl.int64) * q_head, heads < num_heads, q_latent, q_rope)
    rows = begin + gl.arange(0, KEYS, COPY_ROWS)
    keys = begin + gl.arange(0, KEYS, SCORE_KEYS)
    index = load_index(chosen, rows, end)
    _copy_rows(kv + index.to(gl.int64) * ROW, index >= 0, latents.index(0), ropes.index(0))
    index = load_index(chosen, rows + KEYS, end)
    seen = load_index(chosen, keys, end)
    num_tiles = _num_tiles(chosen, begin, end)
    largest, total, acc = _start()
    _arrived()
    if HOLD_ROPE:
        q_rope = q_rope.load(gl.DotOperandLayout(0, SCORES, 2))
    s = _scores(q_latent, q_rope, latents.index(0), ropes.index(0))
    _copy_rows(kv + index.to(gl.int64) * ROW, index >= 0, latents.index(1), ropes.index(1))
    index = load_index(chosen, rows + 2 * KEYS, end)
    s = warpgroup_mma_wait(0, deps=(s,))
    for tile in range(num_tiles - 1):
        buffer = tile % 2
        largest, total, acc = _softmax(s, seen, scale_log2, largest, total, acc, weights)
        pending = warpgroup_mma(weights, latents.index(buffer), acc, is_async=True)
        _arrived()
        s = _scores(q_latent, q_rope, latents.index(1 - buffer), ropes.index(1 - buffer))
        acc = warpgroup_mma_wait(2, deps=(pending,))
        gl.thread_barrier()
        _copy_rows(kv + index.to(gl.int64) * ROW, index >= 0, latents.index(buffer), ropes.index(buffer))
        index = load_index(chosen, rows + (tile + 3) * KEYS, end)
        seen = load_index(chosen, keys + (tile + 1) * KEYS, end)
        s = warpgroup_mma_wait(0, deps=(s,))
    largest, total, acc = _softmax(s, seen, scale_log2, largest, total, acc, weights)
    acc = warpgroup_mma(weights, latents.index((num_tiles - 1) % 2), acc)
    _finish(out, sums, maxima, totals, largest, total, acc, token, head, num_heads, out_token, out_head, SPLIT)


@gluon.jit
def attend_fp8_tile(  # type: ignore[no-untyped-def]
    q, values, scales, rope, indices, out, sums, maxima, totals, num_selected, num_heads, per_part, scale_log2,
    q_token, q_head, out_token, out_head, index_token,
    ROW: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """attend over FP8 rows, of which a part has at most 64: ROW bytes apart, values e4m3, as int32 words, 4 scales
    float32, rope bfloat16. Who adds up the parts may start up at once: see kernels/pdl.py.
    """
    pdl_gluon.wait(PDL)
    pdl_gluon.let_next_start(SPLIT)
    token, head, chosen, begin, end = _share(indices, index_token, num_selected, num_heads, per_part)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [HEADS, LATENT], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], TILE)
    pairs = gl.allocate_shared_memory(gl.int32, [KEYS, LATENT // 2], WORD_TILE)
    latent = pairs._reinterpret(gl.bfloat16, [KEYS, LATENT], TILE)
    key_rope = gl.allocate_shared_memory(gl.bfloat16, [KEYS, ROPE], TILE)
    weights = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], TILE)

    heads = head + gl.arange(0, HEADS, COPY_ROWS)
    _copy_rows(q + token * q_token + heads.to(gl.int64) * q_head, heads < num_heads, q_latent, q_rope)
    index = load_index(chosen, begin + gl.arange(0, KEYS, PACKED_ROWS), end)
    words, scale = _load_packed(values, scales, index, ROW)
    _copy_rope(rope, index, key_rope, ROW)
    _write(words, scale, pairs)
    seen = load_index(chosen, begin + gl.arange(0, KEYS, SCORE_KEYS), end)
    largest, total, acc = _start()
    _arrived()
    s = warpgroup_mma_wait(0, deps=(_scores(q_latent, q_rope, latent, key_rope),))
    largest, total, acc = _softmax(s, seen, scale_log2, largest, total, acc, weights)
    acc = warpgroup_mma(weights, latent, acc)
    _finish(out, sums, maxima, totals, largest, total, acc, token, head, num_heads, out_token, out_head, SPLIT)


@gluon.jit
def _share(indices, index_token, num_selected, num_heads, per_part):  # type: ignore[no-untyped-def]
    """What this program does: its token, first head, and the part of the token's list of indices."""
    blocks = (num_heads + HEADS - 1) // HEADS
    token = (gl.program_id(0) // blocks).to(gl.int64)
    begin = gl.program_id(1) * per_part
    return (
        token,
        gl.program_id(0) % blocks * HEADS,
        indices + token * index_token,
        begin,
        gl.minimum(begin + per_part, num_selected),
    )


@gluon.jit
def _num_tiles(chosen, begin, end):  # type: ignore[no-untyped-def]
    """Tiles up to the last index that is one; at least 1."""
    offsets = gl.arange(0, 2048, LIST)
    last = begin
    for start in range(begin, end, 2048):
        position = start + offsets
        index = load_index(chosen, position, end)
        last = gl.maximum(last, gl.max(gl.where(index >= 0, position + 1, begin), axis=0))
    return gl.maximum((last - begin + KEYS - 1) // KEYS, 1)


@gluon.jit
def _copy_rows(source, valid, latent, rope):  # type: ignore[no-untyped-def]
    """Starts the copy of 64 rows; zeros where not valid."""
    columns = gl.arange(0, LATENT, COPY_COLUMNS)
    rope_columns = LATENT + gl.arange(0, ROPE, COPY_COLUMNS)
    async_copy.async_copy_global_to_shared(latent, source[:, None] + columns[None, :], mask=valid[:, None])
    async_copy.async_copy_global_to_shared(rope, source[:, None] + rope_columns[None, :], mask=valid[:, None])
    async_copy.commit_group()


@gluon.jit
def _copy_rope(rope, index, target, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    index = gl.convert_layout(index, PAIR_ROWS)
    source = rope + (index.to(gl.int64) * (ROW // 2))[:, None] + gl.arange(0, ROPE, PAIR_COLUMNS)[None, :]
    async_copy.async_copy_global_to_shared(target, source, mask=(index >= 0)[:, None])
    async_copy.commit_group()


@gluon.jit
def _arrived():  # type: ignore[no-untyped-def]
    """Whatever any thread has written or copied into shared memory is there for the tensor cores."""
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _load_packed(values, scales, index, ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """64 rows into registers: words [KEYS, 4, 32], 4 codes each, and scales [KEYS, 4]; zeros where no index is."""
    row = index.to(gl.int64) * (ROW // 4)
    source = values + row[:, None] + gl.arange(0, WORDS, PACKED_COLUMNS)[None, :]
    words = gl.reshape(gl.load(source, mask=(index >= 0)[:, None], other=0), [KEYS, BLOCKS, WORDS // BLOCKS])
    layout: gl.constexpr = gl.SliceLayout(2, words.type.layout)
    index = gl.convert_layout(index, gl.SliceLayout(1, layout))
    source = scales + (index.to(gl.int64) * (ROW // 4))[:, None]
    source += gl.arange(0, BLOCKS, gl.SliceLayout(0, layout))[None, :]
    return words, gl.load(source, mask=(index >= 0)[:, None], other=0.0)


@gluon.jit
def _write(words, scale, tile):  # type: ignore[no-untyped-def]
    """What _load_packed gave as bfloat16 into a tile."""
    factor = (scale * 1.329227995784916e36).to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32)  # 2^120
    factor = (factor & 0xFFFF) | (factor << 16)
    low, high = dequantize(words, factor[:, :, None])
    tile.store(gl.reshape(gl.join(low, high), [KEYS, LATENT // 2]))


@gluon.jit
def _start():  # type: ignore[no-untyped-def]
    """Of no row: the largest score, the sum of weights and the sum of weighted rows."""
    largest = gl.full([HEADS], -1e30, gl.float32, SCORE_HEADS)
    total = _thread_sums(gl.zeros([HEADS, KEYS], gl.float32, SCORES))
    return largest, total, gl.zeros([HEADS, LATENT], gl.float32, SUMS)


@gluon.jit
def _scores(q_latent, q_rope, latent, rope):  # type: ignore[no-untyped-def]
    """Two products under way, two groups to wait for."""
    zero = gl.zeros([HEADS, KEYS], gl.float32, SCORES)
    s = warpgroup_mma(q_latent, latent.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, rope.permute((1, 0)), s, is_async=True)


@gluon.jit
def _thread_sums(p):  # type: ignore[no-untyped-def]
    """[HEADS, KEYS] -> [HEADS, warpgroup, lane % 4]: each thread sums what it holds of a row, and asks no other."""
    return gl.sum(gl.sum(gl.reshape(p, [HEADS, 2, KEYS // 16, 4, 2]), axis=4), axis=2)


@gluon.jit
def _softmax(s, index, scale_log2, largest, total, acc, weights):  # type: ignore[no-untyped-def]
    """A tile's weights into shared memory, ready for the tensor cores; everything so far scaled to the new maximum."""
    s = gl.where((index >= 0)[None, :], s * scale_log2, -float("inf"))
    now = gl.maximum(largest, gl.max(s, axis=1))
    p = gl.exp2(s - now[:, None])
    weights.store(p.to(gl.bfloat16))
    shrink = gl.exp2(largest - now)
    summed = gl.convert_layout(shrink, gl.SliceLayout(1, gl.SliceLayout(2, total.type.layout)))
    total = total * summed[:, None, None] + _thread_sums(p)
    acc = acc * gl.convert_layout(shrink, SUM_HEADS)[:, None]
    fence_async_shared()
    gl.thread_barrier()
    return now, total, acc


@gluon.jit
def _finish(  # type: ignore[no-untyped-def]
    out,
    sums,
    maxima,
    totals,
    largest,
    total,
    acc,
    token,
    head,
    num_heads,
    out_token,
    out_head,
    SPLIT: gl.constexpr,
):
    # Copies of rows past the last one still write zeros, and the layout change below reuses that memory.
    async_copy.wait_group(0)
    gl.thread_barrier()
    total = gl.sum(gl.sum(total, axis=2), axis=1)
    if not SPLIT:
        total = gl.convert_layout(total, SUM_HEADS)
        acc = acc / gl.where(total > 0, total, 1.0)[:, None]
        heads = head + gl.arange(0, HEADS, COPY_ROWS)
        columns = gl.arange(0, LATENT, COPY_COLUMNS)
        target = out + token * out_token + heads.to(gl.int64)[:, None] * out_head + columns[None, :]
        gl.store(target, gl.convert_layout(acc.to(gl.bfloat16), COPY), mask=(heads < num_heads)[:, None])
    else:
        row = (token * gl.num_programs(1) + gl.program_id(1)) * num_heads
        heads = head + gl.arange(0, HEADS, SCORE_HEADS)
        gl.store(maxima + row + heads, largest, mask=heads < num_heads)
        gl.store(totals + row + heads, gl.convert_layout(total, SCORE_HEADS), mask=heads < num_heads)
        heads = head + gl.arange(0, HEADS, SUM_HEADS)
        columns = gl.arange(0, LATENT, SUM_COLUMNS)
        gl.store(sums + (row + heads)[:, None] * LATENT + columns[None, :], acc, mask=(heads < num_heads)[:, None])
