"""Products with a float32 result in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def bf16_gemm(x: Tensor, weight: Tensor) -> Tensor:
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return linear(x.float(), weight.float())
