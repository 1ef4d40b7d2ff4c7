"""FP8 (e4m3) with power-of-two scales: 1x128 for activations, 128x128 for weights. Imports: kernels.dispatch.

The scale of a block is s = 2^ceil(log2(max(amax, 1e-4) / 448)), its values are e4m3(x / s). The division by s is
exact, so the only error is the rounding to e4m3: at most 2^-4 of the value, and below s * 2^-6 at most s * 2^-10.
Blocks at the end of a dim that is no multiple of 128 are shorter. A block with NaN or infinity dequantises to NaN.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {"reference": "baleen.kernels.fp8_quant.reference:quantize_1x128"}

_quantize_1x128 = Op(IMPLEMENTATIONS)
_dequantize_1x128 = Op(IMPLEMENTATIONS, "dequantize_1x128")
_round_1x128 = Op(IMPLEMENTATIONS, "round_1x128")
_quantize_128x128 = Op(IMPLEMENTATIONS, "quantize_128x128")
_dequantize_128x128 = Op(IMPLEMENTATIONS, "dequantize_128x128")


def quantize_1x128(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each run of 128 values of the last dim.

    x        [..., K] float32 or bfloat16
    returns  (float8_e4m3fn [..., K], scale float32 [..., ceil(K/128)]); x is about values * scale
    Error:   as above.     Cost: reads x twice.
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
