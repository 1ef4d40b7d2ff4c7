"""The router in torch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    num_experts = logits.shape[1]
    refuse_impossible(num_experts, n_group, topk_group, top_k)
    probabilities = logits.sigmoid()
    choice = probabilities + bias
    if topk_group < n_group:
        grouped = choice.unflatten(1, (n_group, -1))
        group_scores = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1)
        dropped = _largest(group_scores, n_group)[:, topk_group:]
        # -inf and not 0: p + bias may be negative.
        grouped = grouped.scatter(1, dropped[:, :, None].expand(-1, -1, grouped.shape[2]), -torch.inf)
        choice = grouped.flatten(1)
    expert_ids = _largest(choice, top_k)
    weights = probabilities.gather(1, expert_ids)
    if norm_topk_prob:
        # 1e-20 only matters where every chosen p underflowed: weights 0, not NaN.
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    weights = weights * routed_scaling_factor
    if num_shared:
        shared = torch.arange(num_experts, num_experts + num_shared, device=logits.device)
        expert_ids = torch.cat((expert_ids, shared.expand(logits.shape[0], -1)), 1)
        weights = torch.cat((weights, weights.new_ones(logits.shape[0], num_shared)), 1)
    return expert_ids, weights


def refuse_impossible(num_experts: int, n_group: int, topk_group: int, top_k: int) -> None:
    """Raises ValueError if so many experts cannot be chosen."""
    if num_experts % n_group or topk_group > n_group or top_k > num_experts // n_group * topk_group:
        raise ValueError(
            f"moe_gate: cannot choose {top_k} of {num_experts} experts from {topk_group} of {n_group} groups"
        )


def _largest(scores: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest of each row, falling; equal ones by lowest column."""
    if scores.device.type != "cpu":  # a look at the values would wait for the device
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    values, columns = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        # torch.topk orders, and drops, equal scores as it likes.
        columns = scores.sort(dim=1, descending=True, stable=True).indices
    return columns[:, :count]
