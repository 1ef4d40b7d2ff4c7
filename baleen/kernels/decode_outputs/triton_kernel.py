"""Outputs of a decode step in Triton: one launch, a row a thread."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.decode_outputs import reference

_ROWS = 32  # of a program


def decode_outputs(
    ids: Tensor, slots: Tensor, last_ids: Tensor, positions: Tensor, advance: Tensor, turns: Tensor, places: Tensor
) -> None:
    tensors = (ids, slots, last_ids, positions, advance, turns, places)
    runs = ids.is_cuda or triton.knobs.runtime.interpret
    if not runs or any(tensor.dtype != torch.int64 or not tensor.is_contiguous() for tensor in tensors):
        reference.decode_outputs(*tensors)
        return
    num_rows = ids.shape[0]
    if num_rows:
        _leave[(triton.cdiv(num_rows, _ROWS),)](
            *tensors, num_rows, STEPS=places.shape[0], ROWS=_ROWS, num_warps=1, **pdl.launch(ids)
        )


@triton.jit(do_not_specialize=["num_rows"])
def _leave(  # type: ignore[no-untyped-def]
    ids, slots, last_ids, positions, advance, turns, places, num_rows,
    STEPS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    pdl.begin(PDL)
    chosen = tl.load(ids + row, mask=inside)
    turn = tl.load(turns + row, mask=inside, other=0)
    tl.store(places + turn % STEPS * num_rows + row, chosen, mask=inside)
    tl.store(last_ids + tl.load(slots + row, mask=inside, other=0), chosen, mask=inside)
    tl.store(positions + row, tl.load(positions + row, mask=inside) + tl.load(advance + row, mask=inside), mask=inside)
    tl.store(turns + row, turn + 1, mask=inside)
