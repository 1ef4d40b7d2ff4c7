"""Mixture of experts with group-limited sigmoid routing, and the dense MLP of the first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from baleen.config import ModelConfig
from baleen.kernels.fp8_quant import round_1x128
from baleen.kernels.grouped_gemm import grouped_gemm, silu_and_mul
from baleen.kernels.moe_gate import moe_gate
from baleen.model.layers import Linear, weight
from baleen.model.weights import Target


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)); the dense layers and the shared expert."""

    def __init__(self, config: ModelConfig, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        fp8 = config.quantization is not None
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = Linear(config.hidden_size, parts, fp8=fp8, dtype=dtype)
        self.down_proj = Linear(intermediate_size, {"down_proj": config.hidden_size}, fp8=fp8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down_proj(silu_and_mul(self.gate_up(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.gate_up.targets(prefix)
        yield from self.down_proj.targets(prefix)


class Experts(nn.Module):
    """The routed experts of one layer, all on this device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.width = config.n_routed_experts, config.moe_intermediate_size
        self.fp8 = config.quantization is not None
        hidden = config.hidden_size
        self.gate_up = weight(self.num_experts, 2 * self.width, hidden, dtype=dtype)
        self.down = weight(self.num_experts, hidden, self.width, dtype=dtype)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, hidden], expert_ids [T, k] int64, expert_weights [T, k] float32 -> weighted sum over k, [T, hidden]."""
        if self.fp8:
            x = round_1x128(x)
        top_k = expert_ids.shape[1]
        flat = expert_ids.flatten()
        order = flat.argsort(stable=True)
        tokens = order // top_k
        counts = torch.bincount(flat, minlength=self.num_experts)
        hidden = silu_and_mul(grouped_gemm(x[tokens], self.gate_up, counts))
        if self.fp8:
            hidden = round_1x128(hidden)
        out = grouped_gemm(hidden, self.down, counts)
        scaled = out * expert_weights.flatten()[order, None].to(out.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, scaled)

    def targets(self, prefix: str) -> Iterator[Target]:
        kind: Literal["linear", "plain"] = "linear" if self.fp8 else "plain"
        for e in range(self.num_experts):
            for name, dest in (
                ("gate_proj", self.gate_up.data[e, : self.width]),
                ("up_proj", self.gate_up.data[e, self.width :]),
                ("down_proj", self.down.data[e]),
            ):
                yield Target(f"{prefix}{e}.{name}.weight", tuple(dest.shape), dest, kind)


class MoE(nn.Module):
    """Router, routed experts and the always-on shared expert."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.n_group, self.topk_group, self.top_k = config.n_group, config.topk_group, config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.norm_topk_prob = config.norm_topk_prob
        # routing decides in float32: near-equal experts must not swap with the compute type
        self.gate = weight(config.n_routed_experts, config.hidden_size)
        self.bias = weight(config.n_routed_experts)
        self.experts = Experts(config, dtype)
        self.shared_experts = Mlp(config, config.moe_intermediate_size * config.n_shared_experts, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        expert_ids, expert_weights = moe_gate(
            linear(x.float(), self.gate),
            self.bias,
            self.n_group,
            self.topk_group,
            self.top_k,
            self.routed_scaling_factor,
            self.norm_topk_prob,
        )
        return self.experts(x, expert_ids, expert_weights) + self.shared_experts(x)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}gate.weight", tuple(self.gate.shape), self.gate.data, "plain")
        yield Target(f"{prefix}gate.e_score_correction_bias", tuple(self.bias.shape), self.bias.data, "plain")
        yield from self.experts.targets(f"{prefix}experts.")
        yield from self.shared_experts.targets(f"{prefix}shared_experts.")
