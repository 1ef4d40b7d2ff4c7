"""The router: which experts a token goes to, with which weights. Imports: kernels.{dispatch,pdl}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.moe_gate.triton_kernel:moe_gate",
    "reference": "baleen.kernels.moe_gate.reference:moe_gate",
}

_moe_gate = Op(IMPLEMENTATIONS)


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
    """Group-limited sigmoid routing: p = sigmoid(logits) weighs, c = p + bias chooses.

    A group's score is the sum of its two largest c; the topk_group best groups stay; of their experts, the top_k by c.

    logits      [T, E] float32; NaN counts as the largest, and its token's normalised weights are NaN
    bias        [E] float32, e_score_correction_bias
    num_shared  experts after the E that every token goes to as well, with weight 1
    returns     (expert_ids [T, top_k + num_shared] int64, the routed ones by falling c, then E, E + 1, ...; weights
                float32 of that shape): p of the chosen, divided by their sum if norm_topk_prob, times
                routed_scaling_factor
    Error:      rounding; equal scores by lowest group, then lowest expert id.
    Raises:     ValueError if E is no multiple of n_group or the kept groups hold fewer than top_k experts.
    Source:     DeepSeek-V3 report, section 2.1.2.
    """
    return _moe_gate(logits, bias, n_group, topk_group, top_k, routed_scaling_factor, norm_topk_prob, num_shared)
