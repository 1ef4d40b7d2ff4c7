"""The products of all heads as one batched product."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.fp8_quant.reference import quantize_1x128
from baleen.kernels.sparse_mla import Parts


def head_values(attended: Tensor, w_v: Tensor) -> Tensor:
    out = attended.new_empty(*attended.shape[:2], w_v.shape[1])
    torch.bmm(attended.transpose(0, 1), w_v.transpose(1, 2), out=out.transpose(0, 1))
    return out


def head_values_quant(attended: Tensor, w_v: Tensor) -> Quantized:
    return quantize_1x128(head_values(attended, w_v).flatten(1))


def part_values_quant(sums: Tensor, maxima: Tensor, totals: Tensor, w_v: Tensor) -> Quantized:
    attended = Parts(sums, maxima, totals).join()[:, : w_v.shape[0]]
    return head_values_quant(attended.to(w_v.dtype), w_v)
