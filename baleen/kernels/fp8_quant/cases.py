"""Inputs of the FP8 block quantisation: partial last blocks, zeros, many magnitudes, maxima at the edge of a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baleen.kernels.testing import Case


def _spread(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Rows of very different magnitude, the first all zero, the second below the floor."""
    x = torch.randn(shape, generator=g) * torch.exp(4 * torch.randn(*shape[:-1], 1, generator=g))
    flat = x.view(-1, shape[-1])
    flat[:1] = 0
    if flat.shape[0] > 2:
        flat[1] *= 1e-7 / flat[1].abs().max()
        # A maximum that divides to a power of two exactly: the scale must not be rounded up.
        flat[2] = flat[2].clamp(-7, 7)
        flat[2, 0] = 7.0
    return x.to(dtype)


def _activation(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    return (_spread(shape, dtype, g),)


def _sliced(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> tuple[Any, ...]:
    """Rows of a wider tensor."""
    wider = torch.full((*shape[:-1], shape[-1] + 64), torch.nan, dtype=dtype)
    wider[..., 16 : 16 + shape[-1]] = _spread(shape, dtype, g)
    return (wider[..., 16 : 16 + shape[-1]],)


def _quantized(shape: tuple[int, ...], g: torch.Generator) -> tuple[Any, ...]:
    values = torch.randn(shape, generator=g).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, torch.exp2(torch.randint(-9, 5, (*shape[:-1], -(-shape[-1] // 128)), generator=g).float())


def _weight(rows: int, cols: int, power_of_two: bool, g: torch.Generator) -> tuple[Any, ...]:
    values = torch.randn(rows, cols, generator=g).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-cols // 128), generator=g) + 0.1
    return values, torch.exp2(scale.log2().round()) if power_of_two else scale


_SHAPES = ((1, 128), (3, 576), (4, 7), (2, 3, 256), (5, 130), (0, 128), (64, 128))
_WEIGHTS = ((128, 128), (1, 1), (192, 64), (576, 300), (129, 257))

CASES = [
    *(
        Case(function, _activation, (shape, dtype))
        for function in ("quantize_1x128", "round_1x128")
        for shape in _SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("quantize_1x128", _sliced, (shape, dtype))
        for shape in ((9, 256), (2, 3, 128))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Case("quantize_1x128", _activation, ((38, 2048), torch.bfloat16)),
    *(Case("dequantize_1x128", _quantized, (shape,)) for shape in _SHAPES),
    *(
        Case("quantize_128x128", _activation, (shape, dtype))
        for shape in _WEIGHTS
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("dequantize_128x128", _weight, (*shape, power_of_two), rtol=0.0 if power_of_two else 2**-24)
        for shape in _WEIGHTS
        for power_of_two in (True, False)
    ),
]
