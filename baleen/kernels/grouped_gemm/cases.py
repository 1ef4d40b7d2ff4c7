"""Inputs of grouped_gemm and of SwiGLU: idle experts at the start, middle and end, one expert with all, no rows."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _grouped(counts: list[int], n: int, k: int, dtype: torch.dtype, kind: Any, g: torch.Generator) -> tuple[Any, ...]:
    """kind makes of the list what is passed as counts."""
    x, weight = torch.randn(sum(counts), k, generator=g), torch.randn(len(counts), n, k, generator=g)
    return x.to(dtype), weight.to(dtype), kind(counts)


def _gate_up(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(shape, generator=g).mul(4).to(dtype),)


def _gate_up_sliced(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Rows of a wider tensor."""
    wider = torch.full((*shape[:-1], shape[-1] + 64), torch.nan, dtype=dtype)
    wider[..., 16 : 16 + shape[-1]] = _gate_up(shape, dtype, g)[0]
    return (wider[..., 16 : 16 + shape[-1]],)


# Rounding of float32 sums of up to 96 products.
CASES = [
    *(
        Case(
            "grouped_gemm",
            _grouped,
            (counts, n, k, dtype, kind),
            rtol=1e-6 if dtype == torch.float32 else 2**-7,
            atol=2e-5 if dtype == torch.float32 else 2e-2,
        )
        for counts, n, k in (
            ([3], 8, 16),
            ([0, 2, 0, 0, 5, 1, 0], 24, 40),
            ([0, 0, 9], 5, 7),
            ([0, 0], 4, 4),
            ([1] * 16, 32, 96),
            ([20, 30], 64, 33),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for kind in (list, torch.tensor)
    ),
    *(
        # A result of bfloat16 may be the next one, 2^-7 of it away.
        Case("silu_and_mul", make, (shape, dtype), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-30)
        for make, shapes in ((_gate_up, ((1, 2), (5, 96), (2, 3, 8), (0, 4), (3, 1024))), (_gate_up_sliced, ((5, 96),)))
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("silu_and_mul_quant", make, (shape, dtype), flips=1e-3)
        for make, shapes in (
            (_gate_up, ((1, 2), (5, 192), (2, 3, 512), (0, 256), (1, 4096), (40, 4096))),
            (_gate_up_sliced, ((5, 512),)),
        )
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
