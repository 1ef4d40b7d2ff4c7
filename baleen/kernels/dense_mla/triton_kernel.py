"""masked_mha in Triton: bfloat16, head dims that are powers of two.

A program computes one tile of queries of one head. Tiles of keys that all its queries see whole come first; their mask
words are read unless its queries see few enough tokens to have chosen all; those on the diagonal come last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baleen.kernels.dense_mla import reference

LOG2_E = 1.4426950408889634
NO_MASK = 1 << 30  # as dense_rows: more tokens than any query sees

OPTIONS = {"ROWS": 128, "KEYS": 128, "num_warps": 8, "num_stages": 2}


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
    if not _fits(q, k_nope, k_pe, v, mask):
        return reference.masked_mha(q, k_nope, k_pe, v, mask, start, scale, dense_rows)
    num_queries, num_heads, _ = q.shape
    num_keys, _, nope = k_nope.shape
    rope, value = k_pe.shape[1], v.shape[2]
    out = torch.empty(num_queries, num_heads, value, dtype=q.dtype, device=q.device)
    rows, keys = OPTIONS["ROWS"], OPTIONS["KEYS"]
    _attend[(triton.cdiv(num_queries, rows) * num_heads,)](
        _descriptor(rows_of_heads(q), rows, nope),
        _descriptor(rows_of_heads(q), rows, rope),
        _descriptor(rows_of_heads(k_nope), keys, nope),
        _descriptor(k_pe, keys, rope),
        _descriptor(rows_of_heads(v), keys, value),
        mask,
        out,
        num_queries,
        num_keys,
        num_heads,
        start,
        scale * LOG2_E,
        NO_MASK if mask is None else dense_rows,
        q.stride(1),
        k_nope.stride(1),
        v.stride(1),
        0 if mask is None else mask.stride(0),
        head_group(num_keys, nope + value),
        NOPE=nope,
        ROPE=rope,
        VALUE=value,
        **OPTIONS,
    )
    return out


def operands_fit(q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor) -> bool:
    """Whether the copy engine takes them: bfloat16, rows and heads at multiples of 16 bytes."""
    return all(
        x.dtype == torch.bfloat16
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in x.stride()[:-1])
        for x in (q, k_nope, k_pe, v)
    )


def rows_of_heads(x: Tensor) -> Tensor:
    """[S, H, D] as rows [S, n] in which head h begins at h * stride(1)."""
    num_rows, num_heads, dim = x.shape
    return x.as_strided((num_rows, (num_heads - 1) * x.stride(1) + dim), (x.stride(0), 1))


def head_group(num_keys: int, width: int) -> int:
    """How many heads run at a time: those whose keys and values take 16 MiB of L2."""
    return max(min((16 << 20) // (2 * num_keys * width), 16), 1)


def _fits(q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    dims = (k_nope.shape[2], k_pe.shape[1], v.shape[2])
    runs = q.is_cuda or triton.knobs.runtime.interpret
    return (
        runs
        and operands_fit(q, k_nope, k_pe, v)
        and all(16 <= dim <= 128 and dim & (dim - 1) == 0 for dim in dims)
        and (mask is None or mask.stride(1) == 1)
    )


def _descriptor(rows: Tensor, height: int, width: int) -> Any:
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [height, width])


@triton.jit
def _tiles(  # type: ignore[no-untyped-def]
    state,
    queries,
    keys,
    words,
    position,
    begin,
    end,
    scale,
    num_words,
    KEYS: tl.constexpr,
    BITS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Attends to the keys from `begin` to `end`. words: pointers to the first mask word of each row."""
    attended, total, peak = state
    q_nope, q_pe = queries
    k_nope_rows, k_pe_rows, v_rows, k_column, v_column = keys
    column = tl.arange(0, KEYS)
    for key in tl.range(begin, end, KEYS):
        scores = tl.dot(q_nope, k_nope_rows.load([key, k_column]).T)
        scores = tl.dot(q_pe, k_pe_rows.load([key, 0]).T, scores)
        if BITS:
            # The shift is the same for all of a thread's bits, and the bit tested after it a constant.
            chosen = tl.zeros(scores.shape, tl.int32)
            for index in tl.static_range(KEYS // 32):
                word = key // 32 + index
                bits = tl.load(words + word, mask=word < num_words, other=0) if CAUSAL else tl.load(words + word)
                chosen = tl.where((column // 32 == index)[None, :], bits[:, None] >> (column & 6)[None, :], chosen)
            scores = tl.where((chosen & (1 << (column & 25))[None, :]) != 0, scores, float("-inf"))
        if CAUSAL:
            scores = tl.where(key + column[None, :] <= position[:, None], scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1) * scale)
        numerators = tl.math.exp2(scores * scale - highest[:, None])
        shrink = tl.math.exp2(peak - highest)
        total = total * shrink + tl.sum(numerators, 1)
        value = v_rows.load([key, v_column])
        attended = tl.dot(numerators.to(value.dtype), value, attended * shrink[:, None])
        peak = highest
    return attended, total, peak


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "num_heads",
        "start",
        "dense_rows",
        "q_head",
        "k_head",
        "v_head",
        "group",
    ]
)
def _attend(  # type: ignore[no-untyped-def]
    q_nope_rows,
    q_pe_rows,
    k_nope_rows,
    k_pe_rows,
    v_rows,
    mask,
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
    mask_stride,
    group,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Some heads at a time, whose keys stay in L2; of these the longest tiles first.
    tiles = tl.cdiv(num_queries, ROWS)
    first_head = tl.program_id(0) // (tiles * group) * group
    inside = tl.program_id(0) % (tiles * group)
    heads = tl.minimum(num_heads - first_head, group)
    head = first_head + inside % heads
    first = (tiles - 1 - inside // heads) * ROWS

    row = first + tl.arange(0, ROWS)
    position = start + row
    queries = (q_nope_rows.load([first, head * q_head]), q_pe_rows.load([first, head * q_head + NOPE]))
    keys = (k_nope_rows, k_pe_rows, v_rows, head * k_head, head * v_head)
    # A finite peak, so that a row without a visible key so far gives exp2(-inf - peak) = 0.
    attended = tl.zeros((ROWS, VALUE), tl.float32)
    state = (attended, tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), -1e30, tl.float32))
    whole = (start + first + 1) // KEYS * KEYS
    end = tl.minimum(start + first + ROWS, num_keys)
    num_words = tl.cdiv(num_keys, 32)
    words = mask
    if mask is not None:
        words = mask + tl.minimum(row, num_queries - 1).to(tl.int64) * mask_stride
    if mask is None or start + first + ROWS <= dense_rows:
        state = _tiles(state, queries, keys, words, position, 0, whole, scale, num_words, KEYS, False, False)
        state = _tiles(state, queries, keys, words, position, whole, end, scale, num_words, KEYS, False, True)
    else:
        state = _tiles(state, queries, keys, words, position, 0, whole, scale, num_words, KEYS, True, False)
        state = _tiles(state, queries, keys, words, position, whole, end, scale, num_words, KEYS, True, True)
    attended, total, _ = state
    attended = attended * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    offset = (row.to(tl.int64) * num_heads + head) * VALUE
    result = attended.to(out.dtype.element_ty)
    tl.store(out + offset[:, None] + tl.arange(0, VALUE)[None, :], result, mask=(row < num_queries)[:, None])
