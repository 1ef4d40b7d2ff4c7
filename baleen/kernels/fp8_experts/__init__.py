"""The routed experts of one layer on FP8 weights. Imports: kernels.{dispatch,fp8_quant,grouped_gemm,pdl,pdl_gluon}."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.dispatch import Op
from baleen.kernels.fp8_quant import Quantized

IMPLEMENTATIONS = {
    "deep_gemm": "baleen.kernels.fp8_experts.deep_gemm:fp8_experts",
    "triton": "baleen.kernels.fp8_experts.triton_kernel:fp8_experts",
    "reference": "baleen.kernels.fp8_experts.reference:fp8_experts",
}

_fp8_experts = Op(IMPLEMENTATIONS)


def fp8_experts(
    x: Quantized,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """out[t] = sum over k of expert_weights[t,k] * down(silu(gate(x[t])) * up(x[t])) of expert e = expert_ids[t,k].

    x               e4m3 [T, hidden] and its scales [T, hidden/128]; what goes into down is rounded to dtype, then
                    quantised 1x128
    expert_ids      [T, K] int64, all different in a row, in [0, E)
    expert_weights  [T, K] float32
    gate_up         float8_e4m3fn [E, 2N, hidden], the gate's rows first; gate_up_scale float32 [E, 2N/128, hidden/128]
    down            float8_e4m3fn [E, hidden, N]; down_scale float32 [E, hidden/128, N/128]; N a multiple of 128
    dtype           of the products, float32 or bfloat16
    returns         [T, hidden] dtype; summed in float32, in the order of expert_ids
    Error:          rounding, after the quantisations.     Cost: reads the weights of experts that have tokens, once.
    Source:         DeepSeek-V3 report, sections 2.1.2 and 3.3.2.
    """
    return _fp8_experts(x, expert_ids, expert_weights, gate_up, gate_up_scale, down, down_scale, dtype)
