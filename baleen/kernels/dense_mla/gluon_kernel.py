"""masked_mha for Hopper in Gluon: heads of 128 + 64 and 128, bfloat16.

Persistent programs of three groups of four warps. One loads (TMA); two compute, each 64 of a tile's 128 queries, on
their own, so that one's softmax runs beside the other's products. In a group the product with the values lags one tile
of keys behind the scores, so that it runs beside the softmax of the next tile. Tiles of keys go from the diagonal back.

Shared memory: 48 KiB of queries, two stages of 128 keys (48 KiB), values (32 KiB) and their mask words (2 KiB).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
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

from baleen.kernels.dense_mla import triton_kernel
from baleen.kernels.dense_mla.triton_kernel import NO_MASK, head_group, operands_fit, rows_of_heads

# Queries of a tile, and of each of the two groups of warps that compute.
ROWS = gl.constexpr(128)
HALF = gl.constexpr(64)
# Keys of a tile: the width of one matrix instruction and of four mask words.
KEYS = gl.constexpr(128)
STAGES = gl.constexpr(2)  # tile n of all lies in stage n & 1, and is that stage's n >> 1st
NOPE, ROPE, VALUE = gl.constexpr(128), gl.constexpr(64), gl.constexpr(128)

# TAKE_TURNS: one computing group issues its products, then the other. persistent: a program for each multiprocessor,
# which loads its next tile while it ends one; else a program for each tile.
OPTIONS = {"TAKE_TURNS": False, "persistent": True}

# Of 64 comparisons in a row LLVM makes a vector of bits that it then takes apart: four instructions for one.
_SELECT = gl.constexpr("""{
    .reg .pred chosen;
    .reg .b32 bit;
    and.b32 bit, $2, $3;
    setp.ne.b32 chosen, bit, 0;
    selp.f32 $0, $1, 0fFF800000, chosen;
}""")

_TILE = gl.NVMMASharedLayout(128, 16, 2)
_WORDS = gl.NVMMASharedLayout(0, 32, 2)


def masked_mha(
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    mask: Tensor | None,
    start: int,
    scale: float,
    dense_rows: int = 0,
) -> Tensor:
    if not _fits(q, k_nope, k_pe, v):
        return triton_kernel.masked_mha(q, k_nope, k_pe, v, mask, start, scale, dense_rows)
    num_queries, num_heads, _ = q.shape
    num_keys = k_nope.shape[0]
    out = torch.empty(num_queries, num_heads, VALUE.value, dtype=q.dtype, device=q.device)
    if mask is None:
        words, dense_rows = out.view(torch.int32).view(num_queries, -1), NO_MASK
    else:
        words = _aligned_rows(mask)
    items = triton.cdiv(num_queries, ROWS.value) * num_heads
    programs = min(items, _num_sms(q.device)) if OPTIONS["persistent"] else items
    _attend[(programs,)](
        _descriptor(rows_of_heads(q), (HALF.value, NOPE.value)),
        _descriptor(rows_of_heads(q), (HALF.value, ROPE.value)),
        _descriptor(rows_of_heads(k_nope), (KEYS.value, NOPE.value)),
        _descriptor(k_pe, (KEYS.value, ROPE.value)),
        _descriptor(rows_of_heads(v), (KEYS.value, VALUE.value)),
        _descriptor(words, (HALF.value, KEYS.value // 32), _WORDS),
        out,
        num_queries,
        num_keys,
        num_heads,
        start,
        scale * triton_kernel.LOG2_E,
        dense_rows,
        q.stride(1),
        k_nope.stride(1),
        v.stride(1),
        head_group(num_keys, NOPE.value + VALUE.value),
        TAKE_TURNS=OPTIONS["TAKE_TURNS"],
        num_warps=4,
    )
    return out


def _fits(q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor) -> bool:
    dims = (q.shape[2], k_nope.shape[2], k_pe.shape[1], v.shape[2])
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return hopper and dims == (192, 128, 64, 128) and q.shape[0] > 0 and operands_fit(q, k_nope, k_pe, v)


def _descriptor(rows: Tensor, block: tuple[int, int], layout: gl.NVMMASharedLayout = _TILE) -> TensorDescriptor:
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), list(block), layout)


def _aligned_rows(mask: Tensor) -> Tensor:
    """The copy engine takes rows at multiples of 16 bytes."""
    if mask.stride(1) == 1 and mask.stride(0) % 4 == 0 and mask.data_ptr() % 16 == 0:
        return mask
    return pad(mask, (0, -mask.shape[1] % 4)).contiguous()


@lru_cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.constexpr_function
def _score_layout():  # type: ignore[no-untyped-def]
    """Of 64 x 128 sums of one group of warps: thread t of four holds columns 2 t and 2 t + 1 of each eight."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.constexpr_function
def _bit_layout():  # type: ignore[no-untyped-def]
    """_score_layout as 64 rows x 4 words x 32 bits."""
    registers = [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, 4, 32])


@gluon.constexpr_function
def _word_layout():  # type: ignore[no-untyped-def]
    """The words of _bit_layout; a thread's four of a row are next to each other: one load of 16 bytes."""
    registers, lanes = [[0, 1], [0, 2], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, 4])


@gluon.constexpr_function
def _store_layout():  # type: ignore[no-untyped-def]
    """The rows of _score_layout in the same warps, eight columns of a thread next to each other: 16 bytes."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]]
    return gl.DistributedLinearLayout(
        registers, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128]
    )


@gluon.jit
def _num_turns(items):  # type: ignore[no-untyped-def]
    """How many items this program gets: round after round of all programs, every other round backwards."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    whole = items // programs
    place = gl.where(whole % 2 == 0, program, programs - 1 - program)
    return whole + gl.where(place < items - whole * programs, 1, 0)


@gluon.jit
def _item(turn, tiles, num_heads, group):  # type: ignore[no-untyped-def]
    """(head, tile of queries) of a turn: some heads at a time, whose keys stay in L2, their longest tiles first."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    index = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    first_head = index // (tiles * group) * group
    inside = index % (tiles * group)
    heads = gl.minimum(num_heads - first_head, group)
    return first_head + inside % heads, tiles - 1 - inside // heads


@gluon.jit
def _load(  # type: ignore[no-untyped-def]
    descriptors,
    buffers,
    barriers,
    sizes,
    dense_rows,
    q_head,
    k_head,
    v_head,
    group,
):
    num_queries, num_keys, num_heads, start = sizes
    q_nope_rows, q_pe_rows, k_nope_rows, k_pe_rows, v_rows, word_rows = descriptors
    q_nope, q_pe, k_nope, k_pe, v, words = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    tiles = gl.cdiv(num_queries, ROWS)
    count = 0
    for turn in range(_num_turns(tiles * num_heads)):
        head, tile = _item(turn, tiles, num_heads, group)
        row = tile * ROWS
        masked = start + row + ROWS > dense_rows
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, ROWS * (NOPE + ROPE) * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_pe_rows, [row + half * HALF, head * q_head + NOPE], q_full, q_pe.index(half)
            )
            tma.async_copy_global_to_shared(q_nope_rows, [row + half * HALF, head * q_head], q_full, q_nope.index(half))
        key_tiles = gl.cdiv(gl.minimum(start + row + ROWS, num_keys), KEYS)
        for step in range(key_tiles):
            key = (key_tiles - 1 - step) * KEYS
            stage, parity = count & 1, (count >> 1) & 1
            full = k_full.index(stage)
            mbarrier.wait(k_empty.index(stage), parity ^ 1)
            if masked:
                mbarrier.expect(full, KEYS * (NOPE + ROPE) * 2 + ROWS * KEYS // 8)
                for half in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        word_rows, [row + half * HALF, key // 32], full, words.index(stage * 2 + half)
                    )
            else:
                mbarrier.expect(full, KEYS * (NOPE + ROPE) * 2)
            tma.async_copy_global_to_shared(k_pe_rows, [key, 0], full, k_pe.index(stage))
            tma.async_copy_global_to_shared(k_nope_rows, [key, head * k_head], full, k_nope.index(stage))
            mbarrier.wait(v_empty.index(stage), parity ^ 1)
            mbarrier.expect(v_full.index(stage), KEYS * VALUE * 2)
            tma.async_copy_global_to_shared(v_rows, [key, head * v_head], v_full.index(stage), v.index(stage))
            count += 1


@gluon.jit
def _scores(q_nope, q_pe, k_nope, k_pe):  # type: ignore[no-untyped-def]
    zero = gl.zeros([HALF, KEYS], gl.float32, layout=_score_layout())
    sums = warpgroup_mma(q_pe, k_pe.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_nope, k_nope.permute((1, 0)), sums, is_async=True)


@gluon.jit
def _read_bits(words, masked):  # type: ignore[no-untyped-def]
    """The mask words of a tile of keys; all bits set where there is no mask to read."""
    bits = gl.full([HALF, KEYS // 32], -1, gl.int32, layout=_word_layout())
    if masked:
        bits = words.load(_word_layout())
    return bits


@gluon.jit
def _causal(bits, position, key):  # type: ignore[no-untyped-def]
    """Clears the bits of keys after each row's position."""
    word = gl.arange(0, KEYS // 32, layout=gl.SliceLayout(0, _word_layout()))
    seen = position[:, None] + 1 - (key + word * 32)[None, :]
    return bits & gl.where(seen >= 32, -1, (1 << gl.maximum(seen, 0)) - 1)


@gluon.jit
def _hide(scores, bits):  # type: ignore[no-untyped-def]
    """-inf where the bit is not set. The shift is the same for all of a thread's bits, so that it costs one
    instruction a word, and the bit tested after it a constant."""
    words = gl.convert_layout(bits, gl.SliceLayout(2, _bit_layout()), assert_trivial=True).expand_dims(2)
    bit = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, _bit_layout()))).expand_dims(0).expand_dims(1)
    shifted = _as_scores(words >> (bit & 6))
    tested = _as_scores((1 << (bit & 25)) + gl.zeros_like(words))
    return gl.inline_asm_elementwise(
        _SELECT, "=f,f,r,r", [scores, shifted, tested], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _as_scores(bits):  # type: ignore[no-untyped-def]
    return gl.convert_layout(bits.reshape([HALF, KEYS]), _score_layout(), assert_trivial=True)


@gluon.jit
def _softmax(scores, peak, total, scale):  # type: ignore[no-untyped-def]
    highest = gl.maximum(peak, gl.max(scores, axis=1) * scale)
    numerators = gl.exp2(scores * scale - highest[:, None])
    shrink = gl.exp2(peak - highest)
    return numerators, highest, total * shrink + gl.sum(numerators, axis=1), shrink


@gluon.jit
def _weigh(numerators, v, attended):  # type: ignore[no-untyped-def]
    layout: gl.constexpr = gl.DotOperandLayout(0, _score_layout(), 2)
    p = gl.convert_layout(numerators.to(gl.bfloat16), layout, assert_trivial=True)
    return warpgroup_mma(p, v, attended, is_async=True)


@gluon.jit
def _step(  # type: ignore[no-untyped-def]
    state,
    buffers,
    barriers,
    turn,
    count,
    position,
    key,
    masked,
    edge,
    scale,
    HALF_INDEX: gl.constexpr,
    BITS: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
):
    """Scores of one tile of keys, and the product of the tile before with its values."""
    numerators, attended, peak, total = state
    q_nope, q_pe, k_nope, k_pe, v, words = buffers
    q_full, _, k_full, k_empty, v_full, v_empty, my_turn = barriers
    stage, parity = count & 1, (count >> 1) & 1
    before = 1 - stage
    mbarrier.wait(k_full.index(stage), parity)
    if TAKE_TURNS:
        mbarrier.wait(my_turn.index(HALF_INDEX), (count & 1) ^ (1 - HALF_INDEX))
    scores = _scores(q_nope.index(HALF_INDEX), q_pe.index(HALF_INDEX), k_nope.index(stage), k_pe.index(stage))
    attended = _weigh(numerators, v.index(before), attended)
    if TAKE_TURNS:
        mbarrier.arrive(my_turn.index(1 - HALF_INDEX), count=1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if BITS:
        bits = _read_bits(words.index(stage * 2 + HALF_INDEX), masked)
    mbarrier.arrive(k_empty.index(stage), count=1)
    # Long since complete: what follows must not be scheduled before the line above, nor before the scores' wait.
    mbarrier.wait(q_full, turn & 1)
    if BITS:
        if edge:
            bits = _causal(bits, position, key)
        scores = _hide(scores, bits)
    numerators, peak, total, shrink = _softmax(scores, peak, total, scale)
    # For the next product. Here, because no part of the softmax can be scheduled after it, into the wait below.
    mbarrier.wait(v_full.index(stage), parity)
    attended = warpgroup_mma_wait(0, deps=(attended,))
    mbarrier.arrive(v_empty.index(before), count=1)
    return numerators, attended * shrink[:, None], peak, total


@gluon.jit
def _compute(  # type: ignore[no-untyped-def]
    buffers,
    barriers,
    out,
    sizes,
    scale,
    dense_rows,
    group,
    HALF_INDEX: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
):
    num_queries, num_keys, num_heads, start = sizes
    q_nope, q_pe, k_nope, k_pe, v, words = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, my_turn = barriers
    tiles = gl.cdiv(num_queries, ROWS)
    count = 0
    for turn in range(_num_turns(tiles * num_heads)):
        head, tile = _item(turn, tiles, num_heads, group)
        row = tile * ROWS + HALF_INDEX * HALF
        masked = start + tile * ROWS + ROWS > dense_rows
        position = start + row + gl.arange(0, HALF, layout=gl.SliceLayout(1, _word_layout()))
        last = gl.cdiv(gl.minimum(start + tile * ROWS + ROWS, num_keys), KEYS) - 1

        stage, parity = count & 1, (count >> 1) & 1
        mbarrier.wait(q_full, turn & 1)
        mbarrier.wait(k_full.index(stage), parity)
        if TAKE_TURNS:
            mbarrier.wait(my_turn.index(HALF_INDEX), (count & 1) ^ (1 - HALF_INDEX))
        scores = _scores(q_nope.index(HALF_INDEX), q_pe.index(HALF_INDEX), k_nope.index(stage), k_pe.index(stage))
        if TAKE_TURNS:
            mbarrier.arrive(my_turn.index(1 - HALF_INDEX), count=1)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        bits = _read_bits(words.index(stage * 2 + HALF_INDEX), masked)
        mbarrier.arrive(k_empty.index(stage), count=1)
        # A finite peak, so that a row without a visible key so far gives exp2(-inf - peak) = 0.
        peak = gl.full([HALF], -1e30, gl.float32, layout=gl.SliceLayout(1, _score_layout()))
        total = gl.zeros([HALF], gl.float32, layout=gl.SliceLayout(1, _score_layout()))
        scores = _hide(scores, _causal(bits, position, last * KEYS))
        numerators, peak, total, _ = _softmax(scores, peak, total, scale)
        mbarrier.wait(v_full.index(stage), parity)
        attended = gl.zeros([HALF, VALUE], gl.float32, layout=_score_layout())
        state = (numerators, attended, peak, total)
        count += 1

        # Tiles from `whole` on hold keys that some row does not see; with no mask to read, those before are all seen.
        whole = (start + row + 1) // KEYS
        free = gl.where(masked, 0, gl.minimum(whole, last))
        for step in range(last - free):
            index = last - 1 - step
            state = _step(
                state, buffers, barriers, turn, count, position, index * KEYS, masked, index >= whole, scale,
                HALF_INDEX, True, TAKE_TURNS,
            )  # fmt: skip
            count += 1
        for _step_index in range(free):
            state = _step(
                state, buffers, barriers, turn, count, position, 0, masked, False, scale, HALF_INDEX, False, TAKE_TURNS
            )
            count += 1
        mbarrier.arrive(q_empty, count=1)

        numerators, attended, peak, total = state
        before = (count - 1) & 1
        attended = warpgroup_mma_wait(0, deps=(_weigh(numerators, v.index(before), attended),))
        mbarrier.arrive(v_empty.index(before), count=1)
        attended = attended * (1.0 / gl.where(total > 0, total, 1.0))[:, None]
        _store(out, attended, row, head, num_queries, num_heads)


@gluon.jit
def _store(out, attended, row, head, num_queries, num_heads):  # type: ignore[no-untyped-def]
    rows = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, _store_layout()))
    dims = gl.arange(0, VALUE, layout=gl.SliceLayout(0, _store_layout()))
    offset = (rows.to(gl.int64) * num_heads + head) * VALUE
    result = gl.convert_layout(attended.to(gl.bfloat16), _store_layout())
    gl.store(out + offset[:, None] + dims[None, :], result, mask=(rows < num_queries)[:, None])


_SIZES = ("num_queries", "num_keys", "num_heads", "start", "dense_rows", "q_head", "k_head", "v_head", "group")


@gluon.jit(do_not_specialize=_SIZES)
def _attend(  # type: ignore[no-untyped-def]
    q_nope_rows,
    q_pe_rows,
    k_nope_rows,
    k_pe_rows,
    v_rows,
    word_rows,
    out,
    num_queries,
    num_keys,
    num_heads,
    start,
    scale,
    dense_rows,
    q_head,
    k_head,
    v_head,
    group,
    TAKE_TURNS: gl.constexpr,
):
    q_nope = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, NOPE], q_nope_rows.layout)
    q_pe = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, ROPE], q_pe_rows.layout)
    k_nope = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, NOPE], k_nope_rows.layout)
    k_pe = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, ROPE], k_pe_rows.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, VALUE], v_rows.layout)
    words = gl.allocate_shared_memory(gl.int32, [2 * STAGES, HALF, KEYS // 32], word_rows.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    my_turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(my_turn.index(half), count=1)
    fence_async_shared()
    descriptors = (q_nope_rows, q_pe_rows, k_nope_rows, k_pe_rows, v_rows, word_rows)
    buffers = (q_nope, q_pe, k_nope, k_pe, v, words)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, my_turn)
    sizes = (num_queries, num_keys, num_heads, start)
    gl.warp_specialize(
        [
            (_compute, (buffers, barriers, out, sizes, scale, dense_rows, group, gl.constexpr(0), TAKE_TURNS)),
            (_compute, (buffers, barriers, out, sizes, scale, dense_rows, group, gl.constexpr(1), TAKE_TURNS)),
            (_load, (descriptors, buffers, barriers, sizes, dense_rows, q_head, k_head, v_head, group)),
        ],
        [4, 4],
        [240, 24],
    )
