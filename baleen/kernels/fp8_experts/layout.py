"""Rows laid out by expert, as the grouped products take them, in Triton. Nothing here waits for the device.

Masked, for our own: each expert has room for MASKED_TOKENS rows, and a count says how many came; one kernel. Joined,
for DeepGEMM's: the experts' rows follow one another, each expert's from a multiple of the product's block on; three
kernels, for any number of tokens. Scales are written as the products take them, column-major: no kernel turns them
afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_quant import Quantized

MASKED_TOKENS = 128  # the most columns that a tile of the product has
_CHUNK = 32  # tokens counted together in the joined layout
_WORDS = 2048  # of 4 bytes, copied at a time


class Layout(NamedTuple):
    """values float8_e4m3fn [M, hidden]; scale float32 [M / group, hidden/128, group].

    rows      [T*K] int32, of each pair
    ends      [E] int32, of each expert's rows, counted from its own first (masked) or from row 0 (joined)
    group     rows whose scales lie together: an expert's room (masked), all (joined)
    """

    values: Tensor
    scale: Tensor
    rows: Tensor
    ends: Tensor
    group: int
    is_masked: bool


def masked(x: Quantized, expert_ids: Tensor, num_experts: int) -> Layout:
    """Expert e's rows from e * MASKED_TOKENS on. At most MASKED_TOKENS tokens."""
    num_tokens, top_k = expert_ids.shape
    layout = _empty(x, expert_ids, num_experts * MASKED_TOKENS, num_experts, is_masked=True)
    # The programs of one more token count the rows.
    _scatter[(num_tokens + 1, top_k)](
        *_arguments(x, expert_ids, layout, None, None),
        num_tokens,
        num_experts,
        **_shape(x, expert_ids, columns=1),
        CHUNK=MASKED_TOKENS,
        STEP=min(triton.next_power_of_2(num_tokens), MASKED_TOKENS),
        BINS=triton.next_power_of_2(num_experts),
        num_warps=4,
        **pdl.launch(expert_ids),
    )
    return layout


def joined(x: Quantized, expert_ids: Tensor, num_experts: int, block: int) -> Layout:
    """Each expert's rows from the next multiple of block on; an expert without rows ends where it would begin."""
    num_tokens, top_k = expert_ids.shape
    num_pairs = expert_ids.numel()
    num_rows = (triton.cdiv(num_pairs, block) + min(num_experts, num_pairs)) * block
    layout = _empty(x, expert_ids, num_rows, num_experts, is_masked=False)
    chunks = triton.cdiv(num_tokens, _CHUNK)
    bins = triton.next_power_of_2(num_experts)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=expert_ids.device)
    before = torch.empty(chunks, num_experts, dtype=torch.int32, device=expert_ids.device)
    starts = torch.empty_like(counts)
    _count[(chunks,)](
        expert_ids,
        counts,
        before,
        num_tokens,
        num_experts,
        TOP_K=top_k,
        CHUNK=_CHUNK,
        PADDED_K=triton.next_power_of_2(top_k),
        BINS=bins,
        **pdl.launch(expert_ids),
    )
    _place[(1,)](counts, starts, layout.ends, num_experts, BLOCK=block, BINS=bins, **pdl.launch(expert_ids))
    _scatter[(num_tokens, 1)](
        *_arguments(x, expert_ids, layout, starts, before),
        num_tokens,
        num_experts,
        **_shape(x, expert_ids, columns=top_k),
        CHUNK=_CHUNK,
        STEP=_CHUNK,
        BINS=bins,
        num_warps=4,
        **pdl.launch(expert_ids),
    )
    return layout


def _empty(x: Quantized, expert_ids: Tensor, num_rows: int, num_experts: int, *, is_masked: bool) -> Layout:
    hidden, device = x.values.shape[1], expert_ids.device
    group = MASKED_TOKENS if is_masked else num_rows
    values = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(num_rows // group, hidden // 128, group, dtype=torch.float32, device=device)
    rows = torch.empty(expert_ids.numel(), dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    return Layout(values, scale, rows, ends, group, is_masked)


def _arguments(
    x: Quantized, expert_ids: Tensor, layout: Layout, starts: Tensor | None, before: Tensor | None
) -> tuple[object, ...]:
    words = x.values.contiguous().view(torch.int32)
    own = (layout.values.view(torch.int32), *layout[1:5])
    return words, x.scale, expert_ids, starts, before, *own, x.scale.stride(0), x.scale.stride(1)


def _shape(x: Quantized, expert_ids: Tensor, *, columns: int) -> dict[str, int]:
    """columns: pairs of a token that one program copies."""
    hidden, top_k = x.values.shape[1], expert_ids.shape[1]
    return {
        "HIDDEN": hidden,
        "TOP_K": top_k,
        "COLUMNS": columns,
        "PADDED_COLUMNS": triton.next_power_of_2(columns),
        "PADDED_K": triton.next_power_of_2(top_k),
        "PADDED_BLOCKS": triton.next_power_of_2(hidden // 128),
        "WORDS": min(_WORDS, triton.next_power_of_2(hidden // 4)),
    }


@triton.jit
def _ids_of(expert_ids, first, last, TOKENS: tl.constexpr, TOP_K: tl.constexpr, PADDED_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [TOKENS * PADDED_K]: the experts of tokens first, first + 1, ... before last; -1 for none."""
    token, column = first + tl.arange(0, TOKENS), tl.arange(0, PADDED_K)
    inside = (token < last)[:, None] & (column < TOP_K)[None, :]
    ids = tl.load(expert_ids + token[:, None] * TOP_K + column[None, :], mask=inside, other=-1)
    return tl.reshape(ids.to(tl.int32), (TOKENS * PADDED_K,))


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def _count(  # type: ignore[no-untyped-def]
    expert_ids,
    counts,
    before,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED_K: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One chunk: adds its rows of each expert to counts; before [chunks, E] is what counts was then."""
    chunk = tl.program_id(0)
    pdl.begin(PDL)
    ids = _ids_of(expert_ids, chunk * CHUNK, num_tokens, CHUNK, TOP_K, PADDED_K)
    expert = tl.arange(0, BINS)
    own = tl.histogram(ids, BINS, mask=ids >= 0)
    earlier = tl.atomic_add(counts + expert, own, mask=(expert < num_experts) & (own > 0))
    tl.store(before + chunk * num_experts + expert, earlier, mask=(expert < num_experts) & (own > 0))


@triton.jit(do_not_specialize=["num_experts"])
def _place(  # type: ignore[no-untyped-def]
    counts, starts, ends, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr
):
    """Where each expert's rows begin and end."""
    expert = tl.arange(0, BINS)
    pdl.begin(PDL)
    count = tl.load(counts + expert, mask=expert < num_experts, other=0)
    room = (count + BLOCK - 1) // BLOCK * BLOCK
    start = tl.cumsum(room, axis=0) - room
    tl.store(starts + expert, start, mask=expert < num_experts)
    tl.store(ends + expert, start + count, mask=expert < num_experts)


@triton.jit(do_not_specialize=["group", "scale_row", "scale_block", "num_tokens", "num_experts"])
def _scatter(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    expert_ids,
    starts,
    before,
    values,
    scale,
    rows,
    counts,
    group,
    scale_row,
    scale_block,
    num_tokens,
    num_experts,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLUMNS pairs of one token: their rows, and x copied there. x and values in words of 4 bytes.

    A pair's rank in its expert: how many earlier tokens of its chunk go there, STEP of them compared at a time, after
    those of other chunks, `before`.
    starts None: masked, and the only chunk has all tokens; programs past the last token count what each expert has.
    """
    token = tl.program_id(0)
    pdl.begin(PDL)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, PADDED_COLUMNS)
    if token < num_tokens:
        # On their way while the rank is counted.
        block, word = tl.arange(0, PADDED_BLOCKS), tl.arange(0, WORDS)
        has = block < HIDDEN // 128
        factor = tl.load(x_scale + token.to(tl.int64) * scale_row + block * scale_block, mask=has, other=0.0)
        source = x + token.to(tl.int64) * (HIDDEN // 4)
        run = tl.load(source + word, mask=word < HIDDEN // 4, other=0)
        valid = (tl.arange(0, PADDED_COLUMNS) < COLUMNS) & (column < TOP_K)
        expert = tl.load(expert_ids + token * TOP_K + column, mask=valid, other=-2).to(tl.int32)
        rank = tl.zeros((PADDED_COLUMNS,), dtype=tl.int32)
        for first in range(token // CHUNK * CHUNK, token, STEP):
            ids = _ids_of(expert_ids, first, token, STEP, TOP_K, PADDED_K)
            rank += tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
        if starts is None:
            row = expert * group + rank
            place = expert.to(tl.int64) * (group * (HIDDEN // 128)) + rank
        else:
            earlier = tl.load(before + token // CHUNK * num_experts + expert, mask=valid, other=0)
            row = tl.load(starts + expert, mask=valid, other=0) + earlier + rank
            place = row.to(tl.int64)
        tl.store(rows + token * TOP_K + column, row, mask=valid)
        for offset in tl.static_range(0, HIDDEN // 4, WORDS):
            if offset > 0:
                word += WORDS
                run = tl.load(source + word, mask=word < HIDDEN // 4, other=0)
            for k in tl.static_range(COLUMNS):
                this = tl.arange(0, PADDED_COLUMNS) == k
                target = tl.sum(tl.where(this, row, 0), axis=0).to(tl.int64)
                tl.store(values + target * (HIDDEN // 4) + word, run, mask=word < HIDDEN // 4)
                if offset == 0:
                    first = tl.sum(tl.where(this, place, 0), axis=0)
                    tl.store(scale + first + block * group, factor, mask=has)
    elif tl.program_id(1) == 0:
        total = tl.zeros((BINS,), dtype=tl.int32)
        for first in range(0, num_tokens, STEP):
            ids = _ids_of(expert_ids, first, num_tokens, STEP, TOP_K, PADDED_K)
            total += tl.histogram(ids, BINS, mask=ids >= 0)
        expert_id = tl.arange(0, BINS)
        tl.store(counts + expert_id, total, mask=expert_id < num_experts)
