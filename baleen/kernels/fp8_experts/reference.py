"""Routed experts in torch: each expert that has tokens is dequantised and multiplied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import dequantize_1x128, dequantize_128x128, round_1x128
from baleen.kernels.grouped_gemm.reference import silu_and_mul


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
    num_tokens, top_k = expert_ids.shape
    rows = dequantize_1x128(x.values, x.scale)
    products = torch.zeros(num_tokens * top_k, down.shape[1], dtype=dtype, device=rows.device)
    flat = expert_ids.flatten()
    for expert in flat.unique().tolist():
        pairs = (flat == expert).nonzero()[:, 0]
        hidden = linear(rows[pairs // top_k], dequantize_128x128(gate_up[expert], gate_up_scale[expert]))
        hidden = round_1x128(silu_and_mul(hidden.to(dtype))).float()
        products[pairs] = linear(hidden, dequantize_128x128(down[expert], down_scale[expert])).to(dtype)
    return weighted_sum(products, expert_weights)


def weighted_sum(products: Tensor, expert_weights: Tensor) -> Tensor:
    """products [T*K, hidden], expert_weights [T, K] -> [T, hidden]."""
    products = products.unflatten(0, expert_weights.shape)
    return (products.float() * expert_weights[..., None]).sum(1).to(products.dtype)
