"""Routed experts by DeepGEMM's grouped products (package sgl-deep-gemm). Nothing here waits for the device.

Few tokens, in all or to an expert, are multiplied by our own kernel, which reads nothing but the weights of the experts
they go to. The others are laid out by expert: masked while an expert's room holds them all, joined above.
"""

from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.fp8_experts import layout, reference, triton_kernel
from baleen.kernels.fp8_quant import Quantized

deep_gemm.set_pdl(True)  # see kernels/pdl.py: all its kernels wait before they read or write

FEW_TOKENS = 16
FEW_ROWS = 9  # of an expert on average, of at most triton_kernel.MOST_TOKENS tokens
MOST_MASKED = layout.MASKED_TOKENS


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
    weights = (gate_up, gate_up_scale, down, down_scale)
    if not triton_kernel.can_run(x, down, dtype):
        return reference.fp8_experts(x, expert_ids, expert_weights, *weights, dtype)
    num_tokens, top_k = expert_ids.shape
    num_experts, hidden, width = down.shape
    few_rows = num_tokens <= triton_kernel.MOST_TOKENS and num_tokens * top_k <= FEW_ROWS * num_experts
    if num_tokens <= FEW_TOKENS or few_rows:
        return triton_kernel.fp8_experts(x, expert_ids, expert_weights, *weights, dtype)
    expert_ids, num_pairs = expert_ids.contiguous(), expert_ids.numel()
    if num_tokens <= MOST_MASKED:
        place = layout.masked(x, expert_ids, num_experts)
    else:
        place = layout.joined(x, expert_ids, num_experts, deep_gemm.get_mk_alignment_for_contiguous_layout())
    expected = -(-num_pairs // num_experts)
    num_rows = place.values.shape[0]
    gated = torch.empty(num_rows, 2 * width, dtype=torch.bfloat16, device=expert_ids.device)
    _multiply(place, place.values, place.scale, gate_up, gate_up_scale, gated, expected)
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=expert_ids.device)
    scale = torch.empty(num_rows // place.group, width // 128, place.group, dtype=torch.float32, device=x.device)
    triton_kernel.activate(gated, place.rows, num_pairs, values, scale)
    del gated
    products = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=expert_ids.device)
    _multiply(place, values, scale, down, down_scale, products, expected)
    return triton_kernel.weighted_sum(products, place.rows, expert_weights.contiguous(), dtype)


def _multiply(
    place: layout.Layout,
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out: Tensor,
    expected: int,
) -> None:
    """out[row] = values[row] times the weight of the row's expert. expected: rows of an expert on average."""
    scale = scale.transpose(1, 2)
    if place.is_masked:
        grouped = (weight.shape[0], place.group, -1)
        deep_gemm.fp8_m_grouped_gemm_nt_masked(
            (values.view(grouped), scale), (weight, weight_scale), out.view(grouped), place.ends, expected
        )
    else:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (values, scale[0]), (weight, weight_scale), out, place.ends, use_psum_layout=True
        )
