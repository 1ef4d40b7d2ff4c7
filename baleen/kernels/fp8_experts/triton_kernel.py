"""Routed experts of few tokens in Triton, and what stands between the two products for any number of tokens.

A program takes 64 rows of one expert's weight and multiplies them with up to 16 of the expert's tokens, of which the
tensor cores would otherwise be fed padding. Of up to 16 tokens in all, each program finds its own; for more, a plan is
made first: columns of 16 pairs of one expert. Only touched experts are read, each once: the columns of one expert run
side by side and share what they read in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_experts import reference
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.triton_kernel import quantize_blocks, tile_of

_ROWS = 64  # of a weight, in a program: the least a tensor core's product has
_COLUMN = 16  # tokens in a program
_PLAN = _COLUMN + 2  # int32 of one column in the plan: its pairs, their number, their expert
MOST_TOKENS = 128  # whose pairs one program of the plan compares
_OPTIONS = {"num_warps": 4, "num_stages": 4}


def fp8_experts(
    x: Quantized,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    num_tokens = expert_ids.shape[0]
    if not can_run(x, down, dtype):
        return reference.fp8_experts(x, expert_ids, expert_weights, gate_up, gate_up_scale, down, down_scale, dtype)
    weights = (gate_up, gate_up_scale, down, down_scale)
    if num_tokens <= MOST_TOKENS:
        return _few(x, expert_ids.contiguous(), expert_weights.contiguous(), weights, dtype)
    parts = []
    for start in range(0, num_tokens, MOST_TOKENS):
        part = slice(start, start + MOST_TOKENS)
        rows = Quantized(x.values[part], x.scale[part])
        parts.append(_few(rows, expert_ids[part].contiguous(), expert_weights[part].contiguous(), weights, dtype))
    return torch.cat(parts)


def can_run(x: Quantized, down: Tensor, dtype: torch.dtype) -> bool:
    """The kernels take these shapes, on this device."""
    runs = x.values.is_cuda or triton.knobs.runtime.interpret
    blocks = down.shape[1] % 128 == 0 and down.shape[2] % 128 == 0
    return runs and blocks and x.values.shape[0] > 0 and dtype in (torch.bfloat16, torch.float32)


def _few(
    x: Quantized,
    expert_ids: Tensor,
    expert_weights: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    gate_up, gate_up_scale, down, down_scale = weights
    num_pairs = expert_ids.numel()
    gated = torch.empty(num_pairs, gate_up.shape[1], dtype=dtype, device=expert_ids.device)
    plan = columns_of(expert_ids, gate_up.shape[0]) if expert_ids.shape[0] > _COLUMN else None
    _multiply(x, expert_ids, plan, gate_up, gate_up_scale, gated, by_pair=False)
    width = down.shape[2]
    values = torch.empty(num_pairs, width, dtype=torch.float8_e4m3fn, device=expert_ids.device)
    scale = torch.empty(width // 128, num_pairs, dtype=torch.float32, device=expert_ids.device)
    activate(gated, None, num_pairs, values, scale.unsqueeze(0))
    products = torch.empty(num_pairs, down.shape[1], dtype=dtype, device=expert_ids.device)
    _multiply(Quantized(values, scale.t()), expert_ids, plan, down, down_scale, products, by_pair=True)
    return weighted_sum(products, None, expert_weights, dtype)


def columns_of(expert_ids: Tensor, num_experts: int) -> Tensor:
    """int32 [E + T*K // 16, 18]: for each column 16 pairs of one expert, how many of them count, and the expert.

    Expert e's first column is e. Those after it begin at E + (pairs of the experts below e) // 16: room for all of
    them, found without a count of the other experts' columns. Columns of no pair have number 0.
    """
    num_pairs = expert_ids.numel()
    plan = torch.empty(num_experts + num_pairs // _COLUMN, _PLAN, dtype=torch.int32, device=expert_ids.device)
    _plan[(num_experts,)](
        expert_ids,
        plan,
        num_pairs,
        num_experts,
        PAIRS=triton.next_power_of_2(num_pairs),
        COLUMN=_COLUMN,
        STRIDE=_PLAN,
        num_warps=4,
        **pdl.launch(expert_ids),
    )
    return plan


def _multiply(
    x: Quantized,
    expert_ids: Tensor,
    plan: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    out: Tensor,
    *,
    by_pair: bool,
) -> None:
    """out[pair] = weight of the pair's expert times the pair's row of x, or (by_pair False) its token's."""
    num_tokens, top_k = expert_ids.shape
    num_rows, dim = weight.shape[1:]
    _products[(num_rows // _ROWS, num_tokens * top_k if plan is None else plan.shape[0])](
        x.values,
        x.scale,
        expert_ids,
        plan,
        weight,
        weight_scale,
        out,
        num_tokens,
        x.values.stride(0),
        x.scale.stride(0),
        x.scale.stride(1),
        TOP_K=top_k,
        NUM_ROWS=num_rows,
        DIM=dim,
        BY_PAIR=by_pair,
        ROWS=_ROWS,
        TOKENS=_COLUMN,
        STRIDE=_PLAN,
        PADDED_K=triton.next_power_of_2(top_k),
        **_OPTIONS,
        **pdl.launch(expert_ids),
    )


def activate(gated: Tensor, rows: Tensor | None, num_pairs: int, values: Tensor, scale: Tensor) -> None:
    """values, scale = quantize_1x128(silu_and_mul(gated)) of the rows that hold a pair.

    gated   [M, 2N]; values float8_e4m3fn [M, N]
    rows    [num_pairs] int32, the pairs' rows, or None for 0, 1, ...
    scale   float32 [M / R, N/128, R]: column-major for each group of R rows
    """
    width = values.shape[1]
    blocks, num_warps = tile_of(num_pairs * (width // 128))
    _activate[(num_pairs, triton.cdiv(width // 128, blocks))](
        gated,
        rows,
        values,
        scale,
        scale.shape[2],
        ROOM=scale.shape[2] if scale.shape[0] > 1 else 0,
        WIDTH=width,
        BLOCKS=blocks,
        num_warps=num_warps,
        **pdl.launch(gated),
    )


def weighted_sum(products: Tensor, rows: Tensor | None, expert_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """products [M, hidden], the pairs' rows [T*K] int32 or None for 0, 1, ..., expert_weights [T, K] -> [T, hidden]."""
    num_tokens, top_k = expert_weights.shape
    hidden = products.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=dtype, device=products.device)
    columns, num_warps = (256, 1) if num_tokens <= 64 else (1024, 4)
    _weighted_sum[(num_tokens, triton.cdiv(hidden, columns))](
        products,
        rows,
        expert_weights,
        out,
        HIDDEN=hidden,
        TOP_K=top_k,
        COLUMNS=columns,
        num_warps=num_warps,
        **pdl.launch(products),
    )
    return out


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _plan(  # type: ignore[no-untyped-def]
    expert_ids,
    plan,
    num_pairs,
    num_experts,
    PAIRS: tl.constexpr,
    COLUMN: tl.constexpr,
    STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The columns of one expert."""
    expert = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    pdl.begin(PDL)
    ids = tl.load(expert_ids + pair, mask=pair < num_pairs, other=num_experts).to(tl.int32)
    own = (ids == expert).to(tl.int32)
    rank = tl.cumsum(own, axis=0) - 1
    count, below = tl.sum(own, axis=0), tl.sum((ids < expert).to(tl.int32), axis=0)
    # The one before the first of the further columns, which the first one stands for.
    base = num_experts + below // COLUMN - 1
    place = tl.where(rank < COLUMN, expert, base + rank // COLUMN)
    tl.store(plan + place * STRIDE + rank % COLUMN, pair, mask=own > 0)
    tl.store(plan + expert * STRIDE + COLUMN, tl.minimum(count, COLUMN))
    tl.store(plan + expert * STRIDE + (COLUMN + 1), expert)
    for chunk in range(1, (below + count) // COLUMN - below // COLUMN + 1):
        further = plan + (base + chunk) * STRIDE
        tl.store(further + COLUMN, tl.minimum(tl.maximum(count - chunk * COLUMN, 0), COLUMN))
        tl.store(further + (COLUMN + 1), expert)


@triton.jit(do_not_specialize=["num_tokens", "scale_row", "scale_block"])
def _products(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    expert_ids,
    plan,
    weight,
    weight_scale,
    out,
    num_tokens,
    x_stride,
    scale_row,
    scale_block,
    TOP_K: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BY_PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDED_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of the weight of one expert, for a column of the plan; without a plan for all pairs of the expert of
    pair program_id(1), if no pair before is one of them.

    out [T*K, NUM_ROWS]. The row of x is the token's or the pair's; an expert is in a token's pairs once.
    """
    NO_PAIR: tl.constexpr = 0x7FFFFFFF
    BLOCKS: tl.constexpr = DIM // 128
    this = tl.program_id(1)
    pdl.begin(PDL)
    if plan is None:
        expert = tl.load(expert_ids + this)
        token, column = tl.arange(0, TOKENS), tl.arange(0, PADDED_K)
        pairs = token[:, None] * TOP_K + column[None, :]
        ids = tl.load(expert_ids + pairs, mask=(token < num_tokens)[:, None] & (column < TOP_K)[None, :], other=-1)
        pair = tl.min(tl.where(ids == expert, pairs, NO_PAIR), axis=1)
        works = tl.min(pair, axis=0) == this
    else:
        # From the end: the many columns of a last expert that every token has start together, and first.
        place = plan + (tl.num_programs(1) - 1 - this) * STRIDE
        lane = tl.arange(0, TOKENS)
        count, expert = tl.load(place + TOKENS), tl.load(place + TOKENS + 1).to(tl.int64)
        pair = tl.load(place + lane, mask=lane < count, other=NO_PAIR)
        token = pair // TOP_K
        works = count > 0
    if works:
        own = pair < NO_PAIR
        row = tl.where(own, pair if BY_PAIR else token, 0)
        first = tl.program_id(0) * ROWS
        rows, inner = first + tl.arange(0, ROWS), tl.arange(0, 128)
        weights = weight + expert * (NUM_ROWS * DIM) + rows[:, None] * DIM + inner[None, :]
        operands = x + row[:, None] * x_stride + inner[None, :]
        block_scale = weight_scale + expert * (NUM_ROWS // 128 * BLOCKS) + first // 128 * BLOCKS
        row_scale = x_scale + row * scale_row
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        left_scale, right_scale = tl.load(block_scale), tl.load(row_scale)
        for block in range(BLOCKS):
            left = tl.load(weights + block * 128, eviction_policy="evict_first")
            right = tl.load(operands + block * 128, mask=own[:, None], other=0.0)
            # The next block's scales are on their way while this one is multiplied.
            after = tl.minimum(block + 1, BLOCKS - 1)
            next_left, next_right = tl.load(block_scale + after), tl.load(row_scale + after * scale_block)
            total += tl.dot(left, tl.trans(right)) * (left_scale * right_scale)[None, :]
            left_scale, right_scale = next_left, next_right
        target = out + pair.to(tl.int64)[None, :] * NUM_ROWS + rows[:, None]
        tl.store(target, total.to(out.dtype.element_ty), mask=own[None, :])


@triton.jit(do_not_specialize=["column_stride"])
def _activate(  # type: ignore[no-untyped-def]
    gated,
    rows,
    values,
    scale,
    column_stride,
    ROOM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCKS runs of 128 of one pair's row. ROOM: rows whose scales lie together; 0 for all of them."""
    BLOCKS_OF_ROW: tl.constexpr = WIDTH // 128
    row = tl.program_id(0).to(tl.int64)
    pdl.begin(PDL)
    if rows is not None:
        row = tl.load(rows + row).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = columns < WIDTH
    source = gated + row * (2 * WIDTH) + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    hidden = (gate / (1.0 + tl.exp(-gate)) * up).to(gated.dtype.element_ty)
    quantized, factor = quantize_blocks(hidden.to(tl.float32))
    tl.store(values + row * WIDTH + columns, quantized, mask=inside)
    place = row
    if ROOM > 0:
        place = row // ROOM * (ROOM * BLOCKS_OF_ROW) + row % ROOM
    tl.store(scale + place + block * column_stride, factor, mask=block < BLOCKS_OF_ROW)


@triton.jit
def _weighted_sum(  # type: ignore[no-untyped-def]
    products,
    rows,
    expert_weights,
    out,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLUMNS columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    pdl.begin(PDL)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        weight = tl.load(expert_weights + row)
        if rows is not None:
            row = tl.load(rows + row).to(tl.int64)
        product = tl.load(products + row * HIDDEN + columns, mask=columns < HIDDEN, other=0.0)
        total += weight * product.to(tl.float32)
    tl.store(out + token * HIDDEN + columns, total.to(out.dtype.element_ty), mask=columns < HIDDEN)
