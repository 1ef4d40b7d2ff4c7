"""RMSNorm, alone and after the residual addition. Imports: kernels.dispatch."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {"reference": "baleen.kernels.rms_norm.reference:rms_norm"}

_rms_norm = Op(IMPLEMENTATIONS)
_add_rms_norm = Op(IMPLEMENTATIONS, "add_rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim.

    x        [T, D] float32 or bfloat16 (any number of leading dims)
    weight   [D] float32 or bfloat16, whatever x is: checkpoints store norms in either
    returns  [T, D] x.dtype, computed in float32 and rounded once
    Error:   rounding.     Cost: reads and writes x once.
    Source:  DeepSeek-V3 report, section 2.
    """
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a sublayer, and its norm for the next one.

    x, residual  [T, D] float32 or bfloat16, same dtype
    weight       [D]
    returns      (normed [T, D], residual + x [T, D]), x.dtype; the norm is that of the sum as rounded to x.dtype, so
                 the pair equals rms_norm after an addition
    Error:       rounding.     Cost: reads two, writes two [T, D].
    """
    return _add_rms_norm(x, residual, weight, eps)
