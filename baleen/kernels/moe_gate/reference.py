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
) -> tuple[Tensor, Tensor]:
    num_experts = logits.shape[1]
    if num_experts % n_group or topk_group > n_group or top_k > num_experts // n_group * topk_group:
        raise ValueError(
            f"moe_gate: cannot choose {top_k} of {num_experts} experts from {topk_group} of {n_group} groups"
        )
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
    return expert_ids, weights * routed_scaling_factor


def _largest(scores: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest of each row, falling; equal ones by lowest column."""
    if scores.device.type != "cpu":  # a look at the values would wait for the device
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    values, columns = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        # torch.topk orders, and drops, equal scores as it likes.
        columns = scores.sort(dim=1, descending=True, stable=True).indices
    return columns[:, :count]
