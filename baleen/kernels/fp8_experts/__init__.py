"""The routed experts of one layer on FP8 weights. Imports: kernels.{dispatch,fp8_quant,grouped_gemm}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "deep_gemm": "baleen.kernels.fp8_experts.deep_gemm:fp8_experts",
    "reference": "baleen.kernels.fp8_experts.reference:fp8_experts",
}

_fp8_experts = Op(IMPLEMENTATIONS)


def fp8_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """out[t] = sum over k of expert_weights[t,k] * down(silu(gate(x[t])) * up(x[t])) of expert e = expert_ids[t,k].

    x               [T, hidden] float32 or bfloat16; quantised 1x128 before each product, as in fp8_gemm
    expert_ids      [T, K] int64, all different in a row
    expert_weights  [T, K] float32
    gate_up         float8_e4m3fn [E, 2N, hidden], the gate's rows first; gate_up_scale float32 [E, 2N/128, hidden/128]
    down            float8_e4m3fn [E, hidden, N]; down_scale float32 [E, hidden/128, N/128]; N a multiple of 128
    returns         [T, hidden] x.dtype; summed in float32, in the order of expert_ids
    Error:          rounding, after the quantisations.     Cost: reads the weights of experts that have tokens, once.
    Source:         DeepSeek-V3 report, sections 2.1.2 and 3.3.2.
    """
    return _fp8_experts(x, expert_ids, expert_weights, gate_up, gate_up_scale, down, down_scale)
