"""RMSNorm in Triton: a row a program, held in registers, with the addition before and FP8 after in the same pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import BLOCK
from baleen.kernels.fp8_quant.triton_kernel import can_run, column_stride, empty_quantized, rows_of, store_quantized
from baleen.kernels.rms_norm import reference

MAX_DIM = 16384  # of a row in registers
# Values a thread. Few rows: all loads of a row in flight at once, since a multiprocessor has one row and waits. Many:
# several rows a multiprocessor, with fewer threads at each barrier.
_FEW_ROWS = 264
_VALUES = {"few": 16, "many": 32}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _fits(x, weight):
        return reference.rms_norm(x, weight, eps)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, normed, None, None)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _fits(x, weight, residual):
        return reference.add_rms_norm(x, residual, weight, eps)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    _launch(x, residual, weight, eps, normed, total, None)
    return normed, total


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    if not _fits(x, weight):
        return reference.rms_norm_quant(x, weight, eps)
    quantized = empty_quantized(x.shape, x.device)
    _launch(x, None, weight, eps, None, None, quantized)
    return quantized


def add_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Quantized, Tensor]:
    if not _fits(x, weight, residual):
        return reference.add_rms_norm_quant(x, residual, weight, eps)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    quantized = empty_quantized(x.shape, x.device)
    _launch(x, residual, weight, eps, normed, total, quantized)
    return normed, quantized, total


def _fits(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> bool:
    same = residual is None or (residual.dtype, residual.shape) == (x.dtype, x.shape)
    return can_run(x) and x.shape[-1] <= MAX_DIM and weight.is_contiguous() and same


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    normed: Tensor | None,
    total: Tensor | None,
    quantized: Quantized | None,
) -> None:
    rows = rows_of(x)
    added = None if residual is None else rows_of(residual)
    values, scale = (None, None) if quantized is None else quantized
    num_rows, dim = rows.shape
    _norm[(num_rows,)](
        rows,
        added,
        weight,
        normed,
        total,
        values,
        scale,
        eps,
        rows.stride(0),
        0 if added is None else added.stride(0),
        column_stride(num_rows),
        DIM=dim,
        **tile_of(num_rows, dim),
        **pdl.launch(rows),
    )


def tile_of(num_rows: int, dim: int) -> dict[str, Any]:
    """Blocks of a row, as a power of two, and warps of a program."""
    blocks = triton.next_power_of_2(-(-dim // BLOCK))
    values = _VALUES["few" if num_rows <= _FEW_ROWS else "many"]
    return {"BLOCKS": blocks, "num_warps": min(max(blocks * BLOCK // (32 * values), 1), 16)}


@triton.jit(do_not_specialize=["eps", "scale_stride"])
def _norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    normed,
    total,
    values,
    scale,
    eps,
    x_stride,
    residual_stride,
    scale_stride,
    DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row program_id(0), as [BLOCKS, 128]. x and residual of those row strides, outputs contiguous; the pointers of
    residual and of each output may be None. total: only what a residual is added to."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    columns = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = columns < DIM
    # All loads stand before the first use; that of the weight, which comes from further away, is the first.
    factor = tl.load(weight + columns, mask=inside, other=0.0)
    pdl.begin(PDL)
    run = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if residual is not None:
        before = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        run = (before.to(tl.float32) + run.to(tl.float32)).to(run.dtype)
        tl.store(total + row * DIM + columns, run, mask=inside)
    run = run.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(run * run) / DIM + eps)
    out = (run * inverse * factor.to(tl.float32)).to(x.dtype.element_ty)
    if normed is not None:
        tl.store(normed + row * DIM + columns, out, mask=inside)
    if values is not None:
        store_quantized(out.to(tl.float32), values + row * DIM, scale + row, block, columns, scale_stride, DIM)
