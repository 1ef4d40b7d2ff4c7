"""The lightning indexer's scores of every cached token for every query token.

Imports: kernels.{dispatch,fp8_quant,kv_store}.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "deep_gemm": "baleen.kernels.index_logits.deep_gemm:index_logits",
    "triton": "baleen.kernels.index_logits.triton_kernel:index_logits",
    "reference": "baleen.kernels.index_logits.reference:index_logits",
}

_index_logits = Op(IMPLEMENTATIONS)
_plan_pages = Op(IMPLEMENTATIONS, "plan_pages")
_paged_index_logits = Op(IMPLEMENTATIONS, "paged_index_logits")


def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor | None, lengths: Tensor | None = None
) -> Tensor:
    """logits[g,q,s] = key_scales[g,s] * sum over heads h of weights[g,q,h] * relu(q[g,q,h] . keys[g,s]).

    q           [G, Q, Hi, D] float32 or float8_e4m3fn
    weights     [G, Q, Hi] float32, any sign; every factor of the query side (gate, head count and dim, q's FP8 scale)
    keys        [G, S, D] of q's dtype; rows past a request's length may hold anything, and give garbage columns
    key_scales  [G, S] float32, or None for 1
    lengths     [G, Q] int64 or None: the columns of a query from its length on may be left out, and hold anything
    returns     [G, Q, S] float32
    Error:      rounding; FP8 products are exact, sums are float32.
    Cost:       2*G*Q*Hi*S*D flops; reads keys once; scratch 4 MiB whatever the shapes.
    Source:     DeepSeek-V3.2 report, section 2.1 (lightning indexer): relu before the sum over heads.
    """
    return _index_logits(q, weights, keys, key_scales, lengths)


class PagePlan(NamedTuple):
    """What the layers of a step share: page_table [G, n] and lengths [G, 1] int32; schedule: the kernel's own."""

    page_table: Tensor
    lengths: Tensor
    schedule: Tensor | None


def plan_pages(page_table: Tensor, lengths: Tensor) -> PagePlan:
    """Prepares `paged_index_logits` of one query token a request.

    page_table  [G, n], lengths [G], int64 or int32, 1 <= lengths[g] <= n * 64
    Error:      none.
    """
    return _plan_pages(page_table, lengths)


def paged_index_logits(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, plan: PagePlan) -> Tensor:
    """`index_logits` of one query token a request, over the pages where they lie.

    q           float8_e4m3fn [G, Hi, D]; weights [G, Hi] float32
    keys        float8_e4m3fn [P, 64, D], key_scales float32 [P, 64]: views of the pages, see kv_store
    returns     [G, n*64] float32; columns from a request's length on hold anything
    Error:      rounding.     Cost: reads D + 4 bytes a cached token, once.
    """
    return _paged_index_logits(q, weights, keys, key_scales, plan)
