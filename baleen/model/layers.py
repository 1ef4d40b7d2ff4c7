"""The smallest pieces: linear layers, norms, embedding, and where their checkpoint tensors go."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from baleen.kernels.fp8_gemm import fp8_linear_dequantized
from baleen.kernels.rms_norm import rms_norm
from baleen.model.weights import Target


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """An uninitialised parameter; the loader fills it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T, for one checkpoint tensor or several stacked on the output axis.

    parts   name -> rows, in order; `targets` gives each name its slice of the weight
    fp8     the checkpoint holds e4m3 blocks: x is quantised 1x128 as the released model does, the weight was
            dequantised at load
    """

    def __init__(self, in_features: int, parts: dict[str, int], *, fp8: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = parts
        self.fp8 = fp8
        self.weight = weight(sum(parts.values()), in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return fp8_linear_dequantized(x, self.weight) if self.fp8 else linear(x, self.weight)

    def targets(self, prefix: str) -> Iterator[Target]:
        row = 0
        for name, rows in self.parts.items():
            dest = self.weight.data[row : row + rows]
            yield Target(f"{prefix}{name}.weight", tuple(dest.shape), dest, "linear" if self.fp8 else "plain")
            row += rows


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = weight(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}.weight", tuple(self.weight.shape), self.weight.data, "plain")


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(vocab_size, hidden_size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden]."""
        return embedding(ids, self.weight)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}.weight", tuple(self.weight.shape), self.weight.data, "plain")
