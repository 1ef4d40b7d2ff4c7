"""Routed experts by DeepGEMM's grouped products (package sgl-deep-gemm), of few tokens by our own. Nothing here waits
for the device.

Very few tokens to an expert are multiplied by the kernel that reads nothing but the weights of the experts they go to.
Those that fit into the experts' rooms are laid out masked, for the kernel that streams every weight; more are joined,
for DeepGEMM.
"""

from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.fp8_experts import gluon_kernel, layout, reference, triton_kernel
from baleen.kernels.fp8_quant import Quantized

deep_gemm.set_pdl(True)  # see kernels/pdl.py: all its kernels wait before they read or write

FEW_ROWS = 3  # of an expert on average, of at most triton_kernel.MOST_TOKENS tokens


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
    num_tokens, device = expert_ids.shape[0], expert_ids.device
    num_experts, hidden, width = down.shape
    expert_ids, num_pairs = expert_ids.contiguous(), expert_ids.numel()
    if num_tokens <= triton_kernel.MOST_TOKENS and num_pairs <= FEW_ROWS * num_experts:
        return triton_kernel.fp8_experts(x, expert_ids, expert_weights, *weights, dtype)
    if num_tokens <= layout.MASKED_TOKENS and gluon_kernel.can_run(down):
        place = layout.masked(x, expert_ids, num_experts)
    else:
        place = layout.joined(x, expert_ids, num_experts, deep_gemm.get_mk_alignment_for_contiguous_layout())
    num_rows = place.values.shape[0]
    gated = torch.empty(num_rows, 2 * width, dtype=torch.bfloat16, device=device)
    _multiply(place, place.values, place.scale, gate_up, gate_up_scale, gated)
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(num_rows // place.group, width // 128, place.group, dtype=torch.float32, device=device)
    triton_kernel.activate(gated, place.rows, num_pairs, values, scale)
    del gated
    products = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=device)
    _multiply(place, values, scale, down, down_scale, products)
    return triton_kernel.weighted_sum(products, place.rows, expert_weights.contiguous(), dtype)


def _multiply(
    place: layout.Layout, values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor
) -> None:
    """out[row] = values[row] times the weight of the row's expert."""
    if place.is_masked:
        gluon_kernel.multiply(values, scale, place.ends, weight, weight_scale, out)
    else:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (values, scale[0].t()), (weight, weight_scale), out, place.ends, use_psum_layout=True
        )
