"""Rotary position embedding: the tables, and the two layouts as two functions. Imports: kernels.dispatch.

MLA rotates interleaved pairs (2i, 2i+1) of the last 64 of its 192-wide heads and of the shared 64-wide key; the indexer
rotates half-split pairs (i, i+32) of the first 64 of its 128-wide heads. One table serves both. A wrong layout does not
crash: it costs quality at long context, silently.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op
from baleen.kernels.rope.reference import rope_table, yarn_table

IMPLEMENTATIONS = {"reference": "baleen.kernels.rope.reference:rope_interleaved"}

__all__ = ["IMPLEMENTATIONS", "rope_half", "rope_interleaved", "rope_table", "yarn_table"]

_rope_interleaved = Op(IMPLEMENTATIONS)
_rope_half = Op(IMPLEMENTATIONS, "rope_half")


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of the last dim by the angle of frequency i; the result keeps that order.

    x        [T, ..., D] float32 or bfloat16, D even; any strides (a slice of a wider head is fine)
    cos,sin  [T, D/2] float32, the rows of the table at the tokens' positions
    returns  [T, ..., D] x.dtype, new memory; computed in float32
    Error:   rounding.     Cost: reads and writes x once.
    """
    return _rope_interleaved(x, cos, sin)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D/2) of the last dim by the angle of frequency i.

    x        [T, ..., D] float32 or bfloat16, D even; any strides
    cos,sin  [T, D/2] float32, the rows of the table at the tokens' positions
    returns  [T, ..., D] x.dtype, new memory; computed in float32
    Error:   rounding.     Cost: reads and writes x once.
    Source:  DeepSeek-V3.2-Exp README, note of 17 Nov 2025 (the indexer's layout, corrected).
    """
    return _rope_half(x, cos, sin)
