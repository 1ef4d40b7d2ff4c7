"""Argmax in Triton, in two launches: every chunk of a row by a program of its own, then the best of a row's chunks.

A row alone has too few bytes in flight for one multiprocessor. NaN is read as +inf: either makes the row -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.greedy import reference

# Few rows: chunks so small that every multiprocessor has several. Many: less to combine.
_FEW_ROWS = 16
_CHUNKS = {"few": {"CHUNK": 2048, "num_warps": 4}, "many": {"CHUNK": 8192, "num_warps": 8}}


def greedy(logits: Tensor) -> Tensor:
    num_rows, width = logits.shape
    runs = logits.is_cuda or triton.knobs.runtime.interpret
    if not runs or logits.dtype != torch.float32 or logits.stride(1) != 1 or not width:
        return reference.greedy(logits)
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        options = _CHUNKS["few" if num_rows <= _FEW_ROWS else "many"]
        count = triton.cdiv(width, options["CHUNK"])
        largest = torch.empty(num_rows, count, dtype=torch.float32, device=logits.device)
        places = torch.empty(num_rows, count, dtype=torch.int32, device=logits.device)
        early = pdl.launch(logits)
        _chunk_maxima[(count, num_rows)](logits, largest, places, logits.stride(0), width, **options, **early)
        _combine[(num_rows,)](largest, places, out, count, COUNT=triton.next_power_of_2(count), num_warps=1, **early)
    return out


@triton.jit
def best_of(values, columns):  # type: ignore[no-untyped-def]
    """The largest value, and of the columns that have it the lowest. NaN is read as +inf."""
    values = tl.where(values != values, float("inf"), values)
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, columns, 0x7FFFFFFF), 0)


@triton.jit
def _chunk_maxima(  # type: ignore[no-untyped-def]
    logits, largest, places, stride, width, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """The largest value of one chunk of one row, and its lowest column."""
    pdl.begin(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < width, other=-float("inf"))
    best, place = best_of(values, columns)
    at = row * tl.num_programs(0) + chunk
    tl.store(largest + at, best)
    tl.store(places + at, place)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    largest, places, out, count, COUNT: tl.constexpr, PDL: tl.constexpr
):
    """The best chunk of one row: of equals the lowest column."""
    pdl.begin(PDL)
    row = tl.program_id(0)
    chunks = tl.arange(0, COUNT)
    values = tl.load(largest + row * count + chunks, mask=chunks < count, other=-float("inf"))
    columns = tl.load(places + row * count + chunks, mask=chunks < count, other=0x7FFFFFFF)
    best, place = best_of(values, columns)
    tl.store(out + row, tl.where(tl.abs(best) == float("inf"), -1, place).to(tl.int64))
