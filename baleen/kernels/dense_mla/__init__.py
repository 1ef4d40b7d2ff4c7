"""Multi-head attention under a mask: MLA in its expanded form, for short contexts. Imports: kernels.dispatch."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "gluon": "baleen.kernels.dense_mla.gluon_kernel:masked_mha",
    "triton": "baleen.kernels.dense_mla.triton_kernel:masked_mha",
    "reference": "baleen.kernels.dense_mla.reference:dense_mla",
}

_dense_mla = Op(IMPLEMENTATIONS, "dense_mla")
_masked_mha = Op(IMPLEMENTATIONS, "masked_mha")


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


def masked_mha(
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    mask: Tensor | None,
    start: int,
    scale: float,
    dense_rows: int = 0,
) -> Tensor:
    """`dense_mla` of a prefill chunk: query i sits at position start + i and attends to the keys j <= start + i whose
    bit is set.

    q           [Q, H, Dn+Dr] float32 or bfloat16, rope applied
    k_nope      [S, H, Dn], v [S, H, Dv], k_pe [S, Dr] (shared by the heads) of q's dtype: any strides, the last dim
                contiguous; start + Q <= S
    mask        int32 [Q, ceil(S/32)], bit j % 32 of word j // 32 is key j (topk_mask's); None: all bits set
    scale       > 0
    dense_rows  queries that see no more tokens than this have the bits of all of them set, so that their words need
                not be read: the k of the selection
    returns     [Q, H, Dv] q.dtype; 0 for a query that attends to nothing; softmax in float32
    Error:      rounding; on a GPU the softmax's numerators are rounded to bfloat16.
    Cost:       2*H*(Dn+Dr+Dv) flops a query and key up to the query's tile; no scratch on a GPU.
    Source:     DeepSeek-V2 report, section 2.1; the selection as DeepSeek-V3.2's short prefill has it.
    """
    return _masked_mha(q, k_nope, k_pe, v, mask, start, scale, dense_rows)
