"""What MLA's absorbed attention found in the latent space, taken out of it for each head.

Imports: kernels.{dispatch,fp8_quant,pdl,pdl_gluon,sparse_mla}.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.sparse_mla import Parts

IMPLEMENTATIONS = {
    "gluon": "baleen.kernels.head_values.gluon_kernel:part_values_quant",
    "triton": "baleen.kernels.head_values.triton_kernel:head_values_quant",
    "reference": "baleen.kernels.head_values.reference:head_values_quant",
}

_head_values = Op(IMPLEMENTATIONS, "head_values")
_head_values_quant = Op(IMPLEMENTATIONS, "head_values_quant")
_part_values_quant = Op(IMPLEMENTATIONS, "part_values_quant")


def head_values(attended: Tensor, w_v: Tensor) -> Tensor:
    """w_v[h] @ attended[t, h].

    attended  [T, H, latent] float32 or bfloat16, any strides (some of more heads)
    w_v       [H, v, latent] of that dtype, any strides: the value half of kv_b_proj, per head
    returns   [T, H, v] of that dtype
    Error:    rounding.     Cost: reads w_v once; it is what takes time for up to some 200 tokens.
    Source:   DeepSeek-V2 report, section 2.1.2.
    """
    result: Tensor = _head_values(attended, w_v)
    return result


def head_values_quant(attended: Tensor, w_v: Tensor) -> Quantized:
    """quantize_1x128 of the rows of head_values, which are rounded to attended's dtype before: [T, H * v].

    Arguments as of head_values.
    Error:  rounding, after the quantisation. A bad value of a token spoils the token's own blocks only.
    Cost:   reads w_v once; the rows are not written before they are quantised.
    """
    result: Quantized = _head_values_quant(attended, w_v)
    return result


def part_values_quant(parts: Parts, w_v: Tensor) -> Quantized:
    """head_values_quant of parts, joined and rounded to w_v's dtype; of their heads the first, as many as w_v has.

    parts  of T tokens, the latent as wide as w_v's
    w_v    as of head_values
    Error:  as of head_values_quant.
    Cost:   reads the parts once, and w_v once for each token: for a few of them.
    """
    result: Quantized = _part_values_quant(*parts, w_v)
    return result
