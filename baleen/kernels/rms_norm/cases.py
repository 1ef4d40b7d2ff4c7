"""Inputs of the four norms: rows of zeros, tiny ones, rows of a wider tensor; dims of part of a block and of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from baleen.kernels.testing import Case

EPS = 1e-6


def _norm(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    x = torch.randn(rows, dim, generator=g) * 3
    # A row of zeros and one so small that eps decides.
    x[0] = 0
    if rows > 1:
        x[1] *= 1e-4
    return x.to(dtype), torch.randn(dim, generator=g).to(weight_dtype), EPS


def _add(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    x, weight, eps = _norm(rows, dim, dtype, weight_dtype, g)
    return x, torch.randn(rows, dim, generator=g).to(dtype), weight, eps


def _alone(*parameters: Any) -> tuple[Any, ...]:
    """Nothing to add to, as before the first layer."""
    x, *rest = _norm(*parameters)
    return x, None, *rest


def _sliced(add: bool, *parameters: Any) -> tuple[Any, ...]:
    """The same with x, and the residual, as the middle of wider rows, as parts of one GEMM's output are."""
    arguments = _add(*parameters) if add else _norm(*parameters)
    tensors, rest = arguments[: 1 + add], arguments[1 + add :]
    padding = [torch.full((len(x), width), torch.nan, dtype=x.dtype) for x, width in zip(tensors, (64, 8))]
    wider = [torch.cat((pad, x, pad), 1) for pad, x in zip(padding, tensors)]
    return *(w[:, p.shape[1] : -p.shape[1]] for w, p in zip(wider, padding)), *rest


_FUNCTIONS = (
    ("rms_norm", _norm, False),
    ("add_rms_norm", _add, True),
    ("rms_norm_quant", _norm, False),
    ("add_rms_norm_quant", _add, True),
)


def _case(function: str, make: Callable[..., tuple[Any, ...]], parameters: tuple[Any, ...]) -> Case:
    # A float32 sum in another order can take a result of bfloat16 to the next one, 2^-7 of it away.
    rtol = 2e-6 if torch.float32 in parameters[-2:-1] else 2**-7
    return Case(function, make, parameters, rtol, atol=1e-6, flips=1e-3 if function.endswith("quant") else 0)


CASES = [
    *(
        _case(function, make, (rows, dim, dtype, weight_dtype))
        for function, make, _ in _FUNCTIONS
        for rows, dim in ((1, 64), (5, 256), (33, 1536))
        for dtype in (torch.float32, torch.bfloat16)
        for weight_dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        _case(function, make, (rows, dim, torch.bfloat16, torch.float32))
        for function, make, _ in _FUNCTIONS
        for rows, dim in ((3, 7168), (2, 200))
    ),
    *(
        _case(function, _alone, (rows, dim, dtype, torch.float32))
        for function in ("add_rms_norm", "add_rms_norm_quant")
        for rows, dim, dtype in ((1, 7168, torch.bfloat16), (5, 200, torch.float32))
    ),
    *(_case(function, _sliced, (add, 7, 512, torch.bfloat16, torch.float32)) for function, _, add in _FUNCTIONS),
]
