"""Sparse MLA on Hopper, by the kernels of gluon_kernel.py and gluon_fp8.py: any number of heads, latents of 512, rope
parts of 64, in bfloat16. What those do not take goes to triton_kernel.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.sparse_mla import Parts, gluon_fp8, gluon_kernel, reference, triton_kernel
from baleen.kernels.sparse_mla.shares import empty_parts, multiprocessors, shares

_HEADS, _KEYS, _LATENT, _ROPE = 64, 64, 512, 64
_BLOCKS = 4
_BF16_OPTIONS = {"HOLD_ROPE": True}


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> Tensor:
    if d_v != _LATENT or not _fits(q) or not _copies(kv, torch.bfloat16, 8):
        return triton_kernel.sparse_mla(q, kv, indices, scale, d_v)
    return _attend(q, (kv,), kv.stride(0), indices, scale)


def sparse_mla_fp8(q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float) -> Tensor:
    if not _fits(q) or not _is_packed(values, scales, rope):
        return triton_kernel.sparse_mla_fp8(q, values, scales, rope, indices, scale)
    rows = (values.view(torch.int32), scales, rope)
    return _attend(q, rows, values.stride(0), indices, scale)


def sparse_mla_fp8_parts(
    q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float
) -> Parts:
    if not q.shape[0] or not _fits(q) or not _is_packed(values, scales, rope):
        return reference.sparse_mla_fp8_parts(q, values, scales, rope, indices, scale)
    rows = (values.view(torch.int32), scales, rope)
    parts = _launch(q, rows, values.stride(0), indices, scale, None)
    assert parts is not None
    return parts


def _is_packed(values: Tensor, scales: Tensor, rope: Tensor) -> bool:
    """True if these are views of one row, as kv_store makes them."""
    row = values.stride(0)
    fits = values.shape[1] == _LATENT and scales.shape[1] == _BLOCKS and scales.stride() == (row // 4, 1)
    fits = fits and _copies(values, torch.float8_e4m3fn, 16) and _copies(rope, torch.bfloat16, 8)
    return fits and rope.stride(0) == row // 2 and scales.data_ptr() % 16 == 0


def _fits(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.shape[2] == _LATENT + _ROPE and _is_hopper(q.device)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _copies(rows: Tensor, dtype: torch.dtype, multiple: int) -> bool:
    """True if rows can be copied 16 bytes at a time."""
    return rows.dtype == dtype and rows.stride(1) == 1 and rows.stride(0) % multiple == 0 and rows.data_ptr() % 16 == 0


def _attend(q: Tensor, rows: tuple[Tensor, ...], row: int, indices: Tensor, scale: float) -> Tensor:
    out = torch.empty(*q.shape[:2], _LATENT, dtype=q.dtype, device=q.device)
    if out.numel():
        parts = _launch(q, rows, row, indices, scale, out)
        if parts is not None:
            triton_kernel.combine(*parts, out)
    return out


def _kernel(rows: tuple[Tensor, ...], per_part: int, q: Tensor) -> tuple[Any, dict[str, Any]]:
    """The kernel for these rows, and what its launch takes beside them."""
    if len(rows) == 1:
        return gluon_kernel.attend, {"num_warps": gluon_kernel.NUM_WARPS} | _BF16_OPTIONS
    if per_part <= _KEYS:
        return gluon_kernel.attend_fp8_tile, {"num_warps": gluon_kernel.NUM_WARPS} | pdl.launch(q)
    return gluon_fp8.attend, {"num_warps": gluon_fp8.NUM_WARPS} | pdl.launch(q)


def _launch(
    q: Tensor, rows: tuple[Tensor, ...], row: int, indices: Tensor, scale: float, out: Tensor | None
) -> Parts | None:
    """The parts; None if there is one, which is written to out, if there is that."""
    num_tokens, num_heads, _ = q.shape
    if q.stride(2) != 1 or q.stride(0) % 16 or q.stride(1) % 16 or q.data_ptr() % 16:
        q = q.contiguous()
    if indices.stride(1) != 1:
        indices = indices.contiguous()
    num_selected = indices.shape[1]
    programs = num_tokens * -(-num_heads // _HEADS)
    count, per_part = shares(programs, num_selected, _KEYS, multiprocessors(q.device))
    parts = None
    if count > 1 or out is None:
        parts = empty_parts((num_tokens, count, num_heads, _LATENT), q.device)
    kernel, options = _kernel(rows, per_part, q)
    kernel[(programs, count)](
        q,
        *rows,
        indices,
        out,
        *(parts or (None, None, None)),
        num_selected,
        num_heads,
        per_part,
        scale * reference.LOG2_E,
        q.stride(0),
        q.stride(1),
        num_heads * _LATENT,
        _LATENT,
        indices.stride(0),
        ROW=row,
        SPLIT=parts is not None,
        **options,
    )
    return parts
