"""SwiGLU in Triton, with FP8 after it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import BLOCK
from baleen.kernels.fp8_quant.triton_kernel import (
    block_columns,
    can_run,
    column_stride,
    empty_quantized,
    rows_of,
    store_quantized,
    tile_of,
)
from baleen.kernels.grouped_gemm import reference


def silu_and_mul(x: Tensor) -> Tensor:
    if not can_run(x) or x.shape[-1] % 2:
        return reference.silu_and_mul(x)
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
    _launch(x, out, None)
    return out


def silu_and_mul_quant(x: Tensor) -> Quantized:
    if not can_run(x) or x.shape[-1] % 2:
        return reference.silu_and_mul_quant(x)
    quantized = empty_quantized(torch.Size((*x.shape[:-1], x.shape[-1] // 2)), x.device)
    _launch(x, *quantized)
    return quantized


def _launch(x: Tensor, out: Tensor, scale: Tensor | None) -> None:
    rows = rows_of(x)
    num_rows, dim = rows.shape[0], rows.shape[1] // 2
    num_blocks = num_rows * -(-dim // BLOCK)
    blocks, num_warps = tile_of(num_blocks)
    _silu_and_mul[(triton.cdiv(num_blocks, blocks),)](
        rows,
        out,
        scale,
        num_blocks,
        rows.stride(0),
        column_stride(num_rows),
        DIM=dim,
        BLOCKS=blocks,
        num_warps=num_warps,
        **pdl.launch(rows),
    )


@triton.jit(do_not_specialize=["num_blocks", "scale_stride"])
def _silu_and_mul(  # type: ignore[no-untyped-def]
    x, out, scale, num_blocks, x_stride, scale_stride, DIM: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr
):
    """BLOCKS runs of 128 of the result, in the order of the rows. x [T, 2 * DIM] of stride x_stride, out [T, DIM]
    contiguous: e4m3 with scale, x's dtype where that is None."""
    row, block, columns = block_columns(tl.program_id(0) * BLOCKS, num_blocks, DIM, BLOCKS)
    source, inside = x + row[:, None] * x_stride + columns, columns < DIM
    pdl.begin(PDL)
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + DIM, mask=inside, other=0.0).to(tl.float32)
    gate = gate.to(tl.float32)
    # exp(-gate), the sign in the factor log2(e).
    result = (gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up).to(x.dtype.element_ty)
    target = out + row[:, None] * DIM
    if scale is None:
        tl.store(target + columns, result, mask=inside)
    else:
        store_quantized(result.to(tl.float32), target, scale + row, block, columns, scale_stride, DIM)
