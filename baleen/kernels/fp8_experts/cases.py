"""Inputs of fp8_experts: idle experts, one expert with every token, as the shared one, and numbers of tokens on both
sides of what each layout takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.fp8_quant.reference import quantize_1x128
from baleen.kernels.testing import Case


def _blocks(num_experts: int, rows: int, cols: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    values = torch.randn(num_experts, rows, cols, generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    exponents = torch.randint(-12, -9, (num_experts, rows // 128, cols // 128), generator=g)
    return values, torch.exp2(exponents.float())


def _routed(
    tokens: int, top_k: int, num_experts: int, hidden: int, width: int, dtype: torch.dtype, g: torch.Generator
) -> tuple[Any, ...]:
    """The last expert has every token, the second half of the others none."""
    ids = torch.stack([torch.randperm(num_experts // 2, generator=g)[:top_k] for _ in range(tokens)])
    ids[:, -1] = num_experts - 1
    gate_up, down = _blocks(num_experts, 2 * width, hidden, g), _blocks(num_experts, hidden, width, g)
    x = quantize_1x128(torch.randn(tokens, hidden, generator=g).to(dtype))
    return x, ids, torch.rand(tokens, top_k, generator=g), *gate_up, *down, dtype


# Rounding of two products one after the other, the first of up to 384 terms; in bfloat16 it moves values across the
# steps of the second's FP8 activations.
CASES = [
    Case("fp8_experts", _routed, (*shape, dtype), rtol=rtol, atol=atol)
    for shape in (
        (1, 2, 4, 128, 128),
        (7, 3, 9, 256, 128),
        (20, 3, 6, 384, 256),
        (33, 2, 24, 128, 128),
        (128, 3, 8, 128, 128),
        (150, 2, 7, 128, 128),
    )
    for dtype, rtol, atol in ((torch.float32, 1e-4, 5e-2), (torch.bfloat16, 2**-5, 2.0))
]
