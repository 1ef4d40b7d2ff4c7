"""Multi-head attention under a mask: MLA in its expanded form, for short contexts. Imports: kernels.dispatch."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {"reference": "baleen.kernels.dense_mla.reference:dense_mla"}

_dense_mla = Op(IMPLEMENTATIONS)


def dense_mla(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """out[i,h] = softmax over the j with mask[i,j] of (scale * q[i,h] . k[j,h]), times v[j,h].

    q        [Q, H, Dqk] float32 or bfloat16
    k        [S, H, Dqk], v [S, H, Dv] of q's dtype, any strides
    mask     [Q, S] bool, True attends: the causal mask, or the selection's, the same for all heads
    returns  [Q, H, Dv] q.dtype; 0 for a row whose mask is all False; softmax in float32
    Error:   rounding; equal to sparse_mla on the same selection when k and v are expanded from its latents.
    Cost:    2*Q*S*H*(Dqk+Dv) flops at most: keys after the last one that a chunk of queries attends to are left out;
             scratch about 16 MiB, or one query's scores if larger, and a float32 copy of bfloat16 operands.
    Source:  DeepSeek-V2 report, section 2.1.
    """
    return _dense_mla(q, k, v, mask, scale)
