"""Grouped GEMM in torch: one mm per expert that has rows, on views of input and output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm(x: Tensor, weight: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    sizes: list[int] = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(sizes) != weight.shape[0] or sum(sizes) != x.shape[0]:
        given = f"{len(sizes)} counts that sum to {sum(sizes)}"
        raise ValueError(f"grouped_gemm: {given} for {weight.shape[0]} experts and {x.shape[0]} rows")
    out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            stop = start + size
            torch.mm(x[start:stop], weight[expert].t(), out=out[start:stop])
            start = stop
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(x.dtype)
