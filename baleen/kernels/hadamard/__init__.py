"""The Hadamard transform that spreads outliers of indexer q and k before FP8. Imports: kernels.dispatch."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {"reference": "baleen.kernels.hadamard.reference:hadamard"}

_hadamard = Op(IMPLEMENTATIONS)


def hadamard(x: Tensor) -> Tensor:
    """x times the orthonormal Sylvester matrix over the last dim. Orthogonal: q.k stays if both sides are transformed.

    x        [..., D] float32 or bfloat16, D a power of two
    returns  [..., D] x.dtype, computed in float32; scaled by D^-0.5
    Error:   rounding.     Cost: reads and writes x once; 2*D flops per element on the CPU.
    Raises:  ValueError if D is not a power of two.
    Source:  DeepSeek-V3.2-Exp inference/model.py, rotate_activation.
    """
    return _hadamard(x)
