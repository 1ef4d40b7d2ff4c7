"""The router in Triton: one warp a token; scores and columns are one integer, so that a maximum settles ties too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.moe_gate import reference

_MOST_EXPERTS = 1024  # of a warp's registers


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    routed_scaling_factor: float,
    norm_topk_prob: bool,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    reference.refuse_impossible(num_experts, n_group, topk_group, top_k)
    if not _fits(logits, n_group):
        return reference.moe_gate(
            logits, bias, n_group, topk_group, top_k, routed_scaling_factor, norm_topk_prob, num_shared
        )
    columns = top_k + num_shared
    expert_ids = torch.empty(num_tokens, columns, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, columns, dtype=torch.float32, device=logits.device)
    _route[(num_tokens,)](
        logits if logits.stride(1) == 1 else logits.contiguous(),
        bias,
        expert_ids,
        weights,
        logits.stride(0) if logits.stride(1) == 1 else num_experts,
        float(routed_scaling_factor),
        GROUPS=n_group,
        SIZE=num_experts // n_group,
        KEPT=topk_group,
        TOP_K=top_k,
        SHARED=num_shared,
        NORM=norm_topk_prob,
        PADDED_GROUPS=triton.next_power_of_2(n_group),
        PADDED_SIZE=triton.next_power_of_2(num_experts // n_group),
        PADDED_COLUMNS=triton.next_power_of_2(columns),
        num_warps=1,
        **pdl.launch(logits),
    )
    return expert_ids, weights


def _fits(logits: Tensor, n_group: int) -> bool:
    padded = triton.next_power_of_2(n_group) * triton.next_power_of_2(logits.shape[1] // n_group)
    runs = logits.is_cuda or triton.knobs.runtime.interpret
    return runs and logits.dtype == torch.float32 and logits.shape[0] > 0 and padded <= _MOST_EXPERTS


@triton.jit
def _ordered(x, index):  # type: ignore[no-untyped-def]
    """int64 that orders float32 x, NaN above all and equal to itself; equal ones by falling index."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _value(ordered):  # type: ignore[no-untyped-def]
    """The x of `_ordered`."""
    key = (ordered >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["factor"])
def _route(  # type: ignore[no-untyped-def]
    logits,
    bias,
    expert_ids,
    weights,
    stride,
    factor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    NORM: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token. Tiles are [groups, experts of a group]; what pads them is below every score."""
    LEAST: tl.constexpr = -0x8000000000000000
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    group, member = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_SIZE)
    expert = group[:, None] * SIZE + member[None, :]
    inside = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    added = tl.load(bias + expert, mask=inside, other=0.0)
    pdl.begin(PDL)
    probability = 1.0 / (1.0 + tl.exp(-tl.load(logits + expert, mask=inside, other=0.0)))
    score = probability + added
    ordered = tl.where(inside, _ordered(score, expert), LEAST)
    if KEPT < GROUPS:
        best = tl.max(ordered, axis=1)
        group_score = _value(best)
        if SIZE > 1:
            group_score += _value(tl.max(tl.where(ordered == best[:, None], LEAST, ordered), axis=1))
        groups = tl.where(group < GROUPS, _ordered(group_score, group), LEAST)
        kept = group < 0
        for _ in tl.static_range(KEPT):
            taken = groups == tl.max(groups, axis=0)
            kept = kept | taken
            groups = tl.where(taken, LEAST, groups)
        dropped = _ordered(tl.full(expert.shape, float("-inf"), tl.float32), expert)
        ordered = tl.where(kept[:, None] | (inside == 0), ordered, dropped)
    column = tl.arange(0, PADDED_COLUMNS)
    chosen = GROUPS * SIZE - TOP_K + column  # of the shared experts: E, E + 1, ...
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(ordered, axis=1), axis=0)
        chosen = tl.where(column == k, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), chosen)
        ordered = tl.where(ordered == best, LEAST, ordered)
    routed = column < TOP_K
    # Read again where gathering from registers would take as many reductions as there are columns.
    weight = 1.0 / (1.0 + tl.exp(-tl.load(logits + chosen, mask=routed, other=0.0)))
    weight = tl.where(routed, weight, 0.0)
    if NORM:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    weight = tl.where(routed, weight * factor, 1.0)
    place = token * (TOP_K + SHARED) + column
    tl.store(expert_ids + place, chosen.to(tl.int64), mask=column < TOP_K + SHARED)
    tl.store(weights + place, weight, mask=column < TOP_K + SHARED)
