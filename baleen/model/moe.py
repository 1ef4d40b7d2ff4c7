"""Mixture of experts with group-limited sigmoid routing, and the dense MLP of the first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.kernels.bf16_gemm import bf16_gemm
from baleen.kernels.fp8_experts import fp8_experts
from baleen.kernels.fp8_quant import quantize_1x128, round_1x128
from baleen.kernels.grouped_gemm import grouped_gemm, silu_and_mul, silu_and_mul_quant
from baleen.kernels.moe_gate import moe_gate
from baleen.model.layers import Activation, Linear, Precision, block_targets, weight
from baleen.model.quant import BLOCK, scale_shape
from baleen.model.weights import Target


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)); the dense layers and the shared expert."""

    def __init__(self, config: ModelConfig, intermediate_size: int, precision: Precision) -> None:
        super().__init__()
        fp8 = config.quantization is not None
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = Linear(config.hidden_size, parts, fp8=fp8, precision=precision)
        self.down_proj = Linear(intermediate_size, {"down_proj": config.hidden_size}, fp8=fp8, precision=precision)

    @property
    def takes_fp8(self) -> bool:
        """True if the input's FP8 form is read."""
        return self.gate_up.takes_fp8

    def forward(self, x: Activation) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gated = self.gate_up(x)
        if self.down_proj.takes_fp8:
            return self.down_proj(Activation(None, silu_and_mul_quant(gated)))
        return self.down_proj(Activation(silu_and_mul(gated)))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.gate_up.targets(prefix)
        yield from self.down_proj.targets(prefix)


class Experts(nn.Module):
    """The routed experts of one layer, all on this device. FP8 weights are kept as `Linear` keeps them.

    num_shared  shared experts among them, after the routed ones: with FP8 kept, a single shared expert is one more
                that every token goes to, and costs no products of its own
    """

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.width = config.moe_intermediate_size
        self.fp8 = config.quantization is not None
        hidden = config.hidden_size
        self.keeps_fp8 = self.fp8 and precision.keep_fp8 and self.width % BLOCK == 0
        self.num_shared = 1 if self.keeps_fp8 and config.n_shared_experts == 1 else 0
        self.num_experts = config.n_routed_experts + self.num_shared
        dtype = torch.float8_e4m3fn if self.keeps_fp8 else precision.dtype
        self.gate_up = weight(self.num_experts, 2 * self.width, hidden, dtype=dtype)
        self.down = weight(self.num_experts, hidden, self.width, dtype=dtype)
        if self.keeps_fp8:
            self.gate_up_scale = weight(self.num_experts, *scale_shape((2 * self.width, hidden)))
            self.down_scale = weight(self.num_experts, *scale_shape((hidden, self.width)))

    def forward(self, activation: Activation, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, hidden], expert_ids [T, k] int64, expert_weights [T, k] float32 -> weighted sum over k, [T, hidden]."""
        x = activation.plain
        assert x is not None
        if self.keeps_fp8:
            rows = quantize_1x128(x) if activation.fp8 is None else activation.fp8
            weights = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
            return fp8_experts(rows, expert_ids, expert_weights, *weights, x.dtype)
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
        half, blocks = self.width, self.width // BLOCK
        routed = self.num_experts - self.num_shared
        for e in range(self.num_experts):
            expert = f"{prefix}experts.{e}." if e < routed else f"{prefix}shared_experts."
            names = [f"{expert}{name}_proj.weight" for name in ("gate", "up", "down")]
            dests = [self.gate_up.data[e, :half], self.gate_up.data[e, half:], self.down.data[e]]
            if not self.keeps_fp8:
                yield from (Target(name, tuple(dest.shape), dest, kind) for name, dest in zip(names, dests))
                continue
            gate_up = self.gate_up_scale.data[e]
            for name, dest, scale in zip(names, dests, (gate_up[:blocks], gate_up[blocks:], self.down_scale.data[e])):
                yield from block_targets(name, dest, scale)


class MoE(nn.Module):
    """Router, routed experts and the always-on shared expert."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.n_group, self.topk_group, self.top_k = config.n_group, config.topk_group, config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.norm_topk_prob = config.norm_topk_prob
        # bfloat16 in the checkpoint; products and sums are float32: near-equal experts must not swap with the dtype
        self.gate = weight(config.n_routed_experts, config.hidden_size, dtype=precision.dtype)
        self.bias = weight(config.n_routed_experts)
        self.experts = Experts(config, precision)
        shared = 0 if self.experts.num_shared else config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = Mlp(config, shared, precision) if shared else None

    @property
    def takes_fp8(self) -> bool:
        """True if the input's FP8 form is read."""
        return self.experts.keeps_fp8

    def forward(self, x: Activation) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        assert x.plain is not None
        expert_ids, expert_weights = moe_gate(
            bf16_gemm(x.plain, self.gate),
            self.bias,
            self.n_group,
            self.topk_group,
            self.top_k,
            self.routed_scaling_factor,
            self.norm_topk_prob,
            self.experts.num_shared,
        )
        out = self.experts(x, expert_ids, expert_weights)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}gate.weight", tuple(self.gate.shape), self.gate.data, "plain")
        yield Target(f"{prefix}gate.e_score_correction_bias", tuple(self.bias.shape), self.bias.data, "plain")
        yield from self.experts.targets(prefix)
        if self.shared_experts is not None:
            yield from self.shared_experts.targets(f"{prefix}shared_experts.")
