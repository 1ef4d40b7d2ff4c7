"""Grouped GEMM in torch: one mm per expert that has rows, on views of input and output; or, when each expert has a few
rows as in decode of a batch, one batched product over rows padded to the largest group, which is one call, not one an
expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import quantize_1x128

# The batched form: so many rows an expert on average, and at most so many padded rows for each real one.
PADDED_ROWS = (2, 8)
MAX_PADDING = 3


def grouped_gemm(x: Tensor, weight: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    sizes: list[int] = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(sizes) != weight.shape[0] or sum(sizes) != x.shape[0]:
        given = f"{len(sizes)} counts that sum to {sum(sizes)}"
        raise ValueError(f"grouped_gemm: {given} for {weight.shape[0]} experts and {x.shape[0]} rows")
    fewest, most = PADDED_ROWS
    few = fewest * len(sizes) <= x.shape[0] <= most * len(sizes)
    if few and 0 < max(sizes, default=0) * len(sizes) <= MAX_PADDING * x.shape[0]:
        return _padded(x, weight, sizes)
    out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            stop = start + size
            torch.mm(x[start:stop], weight[expert].t(), out=out[start:stop])
            start = stop
    return out


def _padded(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    largest = max(sizes)
    counts = torch.tensor(sizes, device=x.device)
    experts = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    slots = torch.arange(x.shape[0], device=x.device) + experts * largest - first[experts]
    padded = x.new_zeros(len(sizes) * largest, x.shape[1])
    padded[slots] = x
    out = torch.bmm(padded.view(len(sizes), largest, -1), weight.transpose(1, 2))
    return out.flatten(0, 1)[slots]


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(x.dtype)


def silu_and_mul_quant(x: Tensor) -> Quantized:
    return quantize_1x128(silu_and_mul(x))
