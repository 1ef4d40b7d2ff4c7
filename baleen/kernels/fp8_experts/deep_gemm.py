"""Routed experts by DeepGEMM's grouped products (package sgl-deep-gemm). Nothing here waits for the device.

Rows are laid out by expert. Few tokens, as in decode: each expert has room for all of them and a count says how many
came (masked). Many: each expert's rows begin at a multiple of the kernel's block, so room for a block less one each is
kept (contiguous); blocks of no expert are skipped.
"""

from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.fp8_experts import reference
from baleen.kernels.fp8_quant import quantize_1x128
from baleen.kernels.grouped_gemm import silu_and_mul

MASKED_TOKENS = 256  # the largest block of the masked kernel's rows: no block runs into the next expert's


def fp8_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    num_experts, hidden, width = down.shape
    if not _on_gpu(x) or hidden % 128 or width % 128 or not x.shape[0]:
        return reference.fp8_experts(x, expert_ids, expert_weights, gate_up, gate_up_scale, down, down_scale)
    layout = _Layout(expert_ids, num_experts)
    tokens = torch.arange(expert_ids.numel(), device=x.device) // expert_ids.shape[1]
    values, scale = quantize_1x128(x)
    gated = layout.multiply(values.view(torch.uint8)[tokens], scale[tokens], gate_up, gate_up_scale)
    values, scale = quantize_1x128(silu_and_mul(gated))
    products = layout.multiply(values.view(torch.uint8), scale, down, down_scale)
    return reference.weighted_sum(products.to(x.dtype), expert_weights)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class _Layout:
    """Where each (token, k) pair's row lies. rows [T*K] int64."""

    def __init__(self, expert_ids: Tensor, num_experts: int) -> None:
        flat = expert_ids.flatten()
        num_tokens, device = expert_ids.shape[0], flat.device
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(flat).scatter_(0, order, torch.arange(flat.shape[0], device=device))
        rank -= starts[flat]
        self.masked = num_tokens <= MASKED_TOKENS
        if self.masked:
            self.counts = counts.int()
            self.expected = -(-flat.shape[0] // num_experts)
            self.num_rows = num_experts * MASKED_TOKENS
            self.rows = flat * MASKED_TOKENS + rank
            return
        block = deep_gemm.get_mk_alignment_for_contiguous_layout()
        blocks = (counts + block - 1) // block
        ends = blocks.cumsum(0)
        self.num_rows = (-(-flat.shape[0] // block) + min(num_experts, flat.shape[0])) * block
        self.rows = (ends - blocks)[flat] * block + rank
        of_block = torch.searchsorted(ends, torch.arange(self.num_rows // block, device=device), right=True)
        of_block.masked_fill_(of_block == num_experts, -1)
        self.experts = of_block.int().repeat_interleave(block, output_size=self.num_rows)

    def multiply(self, values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """values [T*K, C] uint8 and scale [T*K, C/128] in the pairs' order -> [T*K, N] bfloat16 in the same."""
        num_experts, width, _ = weight.shape
        padded = values.new_empty(self.num_rows, values.shape[1]).index_copy_(0, self.rows, values)
        padded_scale = scale.new_empty(self.num_rows, scale.shape[1]).index_copy_(0, self.rows, scale)
        out = torch.empty(self.num_rows, width, dtype=torch.bfloat16, device=values.device)
        pair, weights = (padded.view(torch.float8_e4m3fn), padded_scale), (weight, weight_scale)
        if self.masked:
            grouped = (num_experts, MASKED_TOKENS, -1)
            pair = (pair[0].view(grouped), pair[1].view(grouped))
            deep_gemm.fp8_m_grouped_gemm_nt_masked(pair, weights, out.view(grouped), self.counts, self.expected)
        else:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(pair, weights, out, self.experts)
        return out.index_select(0, self.rows)
