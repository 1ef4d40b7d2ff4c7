"""RMSNorm, alone and after the residual addition, its result as it is or quantised to FP8 for the next GEMM.

Imports: kernels.{dispatch,fp8_quant,pdl}.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op
from baleen.kernels.fp8_quant import Quantized

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.rms_norm.triton_kernel:rms_norm",
    "reference": "baleen.kernels.rms_norm.reference:rms_norm",
}

_rms_norm = Op(IMPLEMENTATIONS)
_add_rms_norm = Op(IMPLEMENTATIONS, "add_rms_norm")
_rms_norm_quant = Op(IMPLEMENTATIONS, "rms_norm_quant")
_add_rms_norm_quant = Op(IMPLEMENTATIONS, "add_rms_norm_quant")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim.

    x        [T, D] float32 or bfloat16 (any number of leading dims); rows may be strided, as a slice of wider ones is
    weight   [D] float32 or bfloat16, whatever x is: checkpoints store norms in either
    returns  [T, D] x.dtype, computed in float32 and rounded once
    Error:   rounding.     Cost: reads and writes x once.
    Source:  DeepSeek-V3 report, section 2.
    """
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a sublayer, and its norm for the next one.

    x, residual  [T, D] float32 or bfloat16, same dtype; rows may be strided; without residual the sum is x itself
    weight       [D]
    returns      (normed [T, D], residual + x [T, D]), x.dtype; the norm is that of the sum as rounded to x.dtype, so
                 the pair equals rms_norm after an addition
    Error:       rounding.     Cost: reads two, writes two [T, D].
    """
    return _add_rms_norm(x, residual, weight, eps)


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """quantize_1x128(rms_norm(x, weight, eps)), the norm rounded to x.dtype before.

    x        [T, D] as for rms_norm
    returns  values [T, D], scale [T, ceil(D/128)]
    Error:   rounding; then that of quantize_1x128.     Cost: reads x once, writes half of it (bfloat16).
    """
    return _rms_norm_quant(x, weight, eps)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Quantized, Tensor]:
    """add_rms_norm whose norm is wanted as it is and quantised.

    x, residual, weight  as for add_rms_norm
    returns  (normed [T, D] x.dtype, quantize_1x128(normed), residual + x [T, D] x.dtype)
    Error:   as above.     Cost: reads two, writes two and a half [T, D] (bfloat16).
    """
    return _add_rms_norm_quant(x, residual, weight, eps)
