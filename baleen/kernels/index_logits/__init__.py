"""The lightning indexer's scores of every cached token for every query token. Imports: kernels.{dispatch,fp8_quant}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {"reference": "baleen.kernels.index_logits.reference:index_logits"}

_index_logits = Op(IMPLEMENTATIONS)


def index_logits(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor | None) -> Tensor:
    """logits[g,q,s] = key_scales[g,s] * sum over heads h of weights[g,q,h] * relu(q[g,q,h] . keys[g,s]).

    q           [G, Q, Hi, D] float32 or float8_e4m3fn
    weights     [G, Q, Hi] float32, any sign; every factor of the query side (gate, head count and dim, q's FP8 scale)
    keys        [G, S, D] of q's dtype; rows past a request's length may hold anything, and give garbage columns
    key_scales  [G, S] float32, or None for 1
    returns     [G, Q, S] float32
    Error:      rounding; FP8 products are exact, sums are float32.
    Cost:       2*G*Q*Hi*S*D flops; reads keys once; scratch 4 MiB whatever the shapes.
    Source:     DeepSeek-V3.2 report, section 2.1 (lightning indexer): relu before the sum over heads.
    """
    return _index_logits(q, weights, keys, key_scales)
