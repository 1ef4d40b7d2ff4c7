"""FP8 (e4m3) with power-of-two scales: 1x128 for activations, 128x128 for weights. Imports: kernels.{dispatch,pdl}.

The scale of a block is s = 2^ceil(log2(max(amax, 1e-4) / 448)), its values are e4m3(x / s). The division by s is
exact, so the only error is the rounding to e4m3: at most 2^-4 of the value, and below s * 2^-6 at most s * 2^-10.
Blocks at the end of a dim that is no multiple of 128 are shorter. A block with NaN or infinity dequantises to NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.fp8_quant.triton_kernel:quantize_1x128",
    "reference": "baleen.kernels.fp8_quant.reference:quantize_1x128",
}

_quantize_1x128 = Op(IMPLEMENTATIONS)
_dequantize_1x128 = Op(IMPLEMENTATIONS, "dequantize_1x128")
_round_1x128 = Op(IMPLEMENTATIONS, "round_1x128")
_quantize_128x128 = Op(IMPLEMENTATIONS, "quantize_128x128")
_dequantize_128x128 = Op(IMPLEMENTATIONS, "dequantize_128x128")


class Quantized(NamedTuple):
    """Activations in FP8: values float8_e4m3fn [..., K] and scale float32 [..., ceil(K/128)], laid out as by
    `empty_scale` where a GPU's kernel made it; what reads it asks the strides."""

    values: Tensor
    scale: Tensor

    @property
    def device(self) -> torch.device:
        """Of both."""
        return self.values.device


def empty_scale(num_rows: int, num_blocks: int, device: torch.device) -> Tensor:
    """Uninitialised scales of a [num_rows, 128 * num_blocks] tensor, as FP8 GEMMs take them without a copy.

    returns  float32 [num_rows, num_blocks], column-major: strides (1, num_rows rounded up to 4), which makes a column a
             multiple of 16 bytes, as the bulk copies of a GPU want it
    Error:   none.
    """
    return torch.empty_strided((num_rows, num_blocks), (1, -(-num_rows // 4) * 4), dtype=torch.float32, device=device)


def quantize_1x128(x: Tensor) -> Quantized:
    """Quantises each run of 128 values of the last dim.

    x        [..., K] float32 or bfloat16; rows may be strided, as a slice of wider ones is
    returns  values [..., K] and scale [..., ceil(K/128)]; x is about values * scale
    Error:   as above.     Cost: reads x once (reference: twice), writes half of it or a quarter.
    Source:  DeepSeek-V3.2-Exp inference/kernel.py, act_quant with scale_fmt ue8m0.
    """
    return _quantize_1x128(x)


def dequantize_1x128(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale, exactly.

    values   float8_e4m3fn [..., K]
    scale    float32 [..., ceil(K/128)]
    returns  float32 [..., K]
    Error:   none.
    Raises:  ValueError if the last dim of scale is not ceil(K/128).
    """
    return _dequantize_1x128(values, scale)


def round_1x128(x: Tensor) -> Tensor:
    """dequantize_1x128(*quantize_1x128(x)) without passing through FP8 memory: what an FP8 GEMM sees of x.

    x        [..., K] float32 or bfloat16
    returns  [..., K] x.dtype, which holds e4m3 times a power of two exactly
    Error:   none against the pair of calls (a zero may change its sign).     Cost: five times faster than the pair.
    """
    return _round_1x128(x)


def quantize_128x128(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each 128x128 block of a weight.

    weight   [N, K] float32 or bfloat16
    returns  (float8_e4m3fn [N, K], weight_scale_inv float32 [ceil(N/128), ceil(K/128)]); despite its name, which is the
             checkpoint's, the scale is the multiplier
    Error:   as above.     Cost: allocates up to two float32 [N, K].
    """
    return _quantize_128x128(weight)


def dequantize_128x128(weight: Tensor, weight_scale_inv: Tensor) -> Tensor:
    """weight * weight_scale_inv, block by block.

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  float32 [ceil(N/128), ceil(K/128)], any values (not only powers of two)
    returns           float32 [N, K]
    Error:            one rounding; none for power-of-two scales.     Cost: allocates the result only.
    Raises:           ValueError if the scale's shape does not fit.
    """
    return _dequantize_128x128(weight, weight_scale_inv)
