"""Inputs of a decode step in Triton: one launch, a part of a row of the page table a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.decode_inputs import DecodeInputs, reference

_PAGES = 1024  # of a program


def decode_inputs(
    slots: Tensor, positions: Tensor, last_ids: Tensor, page_table: Tensor, num_pages: int, page_size: int
) -> DecodeInputs:
    whole = slots.is_contiguous() and positions.is_contiguous() and last_ids.is_contiguous()
    if not whole or page_table.stride(1) != 1 or not (slots.is_cuda or triton.knobs.runtime.interpret):
        return reference.decode_inputs(slots, positions, last_ids, page_table, num_pages, page_size)
    num_rows, device = slots.shape[0], slots.device
    ids, kv_slots, lengths = (torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(3))
    short_lengths = torch.empty(num_rows, dtype=torch.int32, device=device)
    table = torch.empty(num_rows, num_pages, dtype=torch.int32, device=device)
    if num_rows:
        _gather[(num_rows, triton.cdiv(num_pages, _PAGES))](
            slots,
            positions,
            last_ids,
            page_table,
            ids,
            kv_slots,
            table,
            lengths,
            short_lengths,
            page_table.stride(0),
            num_pages,
            PAGE_SIZE=page_size,
            PAGES=_PAGES,
            num_warps=4,
            **pdl.launch(slots),
        )
    return DecodeInputs(ids, kv_slots, table, lengths, short_lengths)


@triton.jit(do_not_specialize=["num_pages"])
def _gather(  # type: ignore[no-untyped-def]
    slots,
    positions,
    last_ids,
    page_table,
    ids,
    kv_slots,
    table,
    lengths,
    short_lengths,
    table_stride,
    num_pages,
    PAGE_SIZE: tl.constexpr,
    PAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some pages of one row; its first program has what is one number a row, too."""
    pdl.begin(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    pages = page_table + slot * table_stride
    columns = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    inside = columns < num_pages
    taken = tl.load(pages + columns, mask=inside, other=0)
    tl.store(table + row.to(tl.int64) * num_pages + columns, taken.to(tl.int32), mask=inside)
    if tl.program_id(1) == 0:
        position = tl.load(positions + row)
        page = tl.load(pages + position // PAGE_SIZE)
        tl.store(ids + row, tl.maximum(tl.load(last_ids + slot), 0))
        tl.store(kv_slots + row, page * PAGE_SIZE + position % PAGE_SIZE)
        tl.store(lengths + row, position + 1)
        tl.store(short_lengths + row, (position + 1).to(tl.int32))
