"""The LM head in torch, then argmax."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.bf16_gemm.reference import bf16_gemm
from baleen.kernels.greedy.reference import greedy


def lm_head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = bf16_gemm(hidden, weight)
    return logits, greedy(logits)
