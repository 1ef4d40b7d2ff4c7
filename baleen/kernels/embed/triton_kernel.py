"""Rows of a table in Triton: a part of a row a program, since torch's kernel for few rows takes a thread per value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.embed import reference

_VALUES = 1024  # of a program


def embed(weight: Tensor, ids: Tensor) -> Tensor:
    runs = weight.is_cuda or triton.knobs.runtime.interpret
    if not runs or weight.stride(1) != 1 or ids.dim() != 1 or not ids.is_contiguous():
        return reference.embed(weight, ids)
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    if out.numel():
        _copy_rows[(ids.shape[0], triton.cdiv(weight.shape[1], _VALUES))](
            weight, ids, out, weight.stride(0), DIM=weight.shape[1], VALUES=_VALUES, num_warps=4, **pdl.launch(ids)
        )
    return out


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    weight, ids, out, stride, DIM: tl.constexpr, VALUES: tl.constexpr, PDL: tl.constexpr
):
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    inside = columns < DIM
    values = tl.load(weight + tl.load(ids + row) * stride + columns, mask=inside)
    tl.store(out + row * DIM + columns, values, mask=inside)
