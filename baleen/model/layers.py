"""The smallest pieces: linear layers, norms, embedding, and where their checkpoint tensors go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from baleen.kernels.embed import embed
from baleen.kernels.fp8_gemm import fp8_gemm, fp8_linear_dequantized
from baleen.kernels.fp8_quant import Quantized, quantize_1x128
from baleen.kernels.rms_norm import add_rms_norm, add_rms_norm_quant, rms_norm, rms_norm_quant
from baleen.model.quant import BLOCK, SCALE_SUFFIX, scale_shape
from baleen.model.weights import Target


@dataclass(frozen=True)
class Precision:
    """What the model computes in.

    dtype     weights and activations
    keep_fp8  the FP8 weights of an FP8 checkpoint stay as stored, for a device that multiplies FP8; else they are
              dequantised to `dtype` at load, which gives the same numbers
    """

    dtype: torch.dtype
    keep_fp8: bool = False


class Activation(NamedTuple):
    """What linear layers read: rows as computed [T, in], the same quantised 1x128 for weights kept in FP8, or both."""

    plain: Tensor | None
    fp8: Quantized | None = None


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """An uninitialised parameter; the loader fills it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T, for one checkpoint tensor or several stacked on the output axis.

    parts   name -> rows, in order; `targets` gives each name its slice of the weight
    fp8     the checkpoint holds e4m3 blocks: x is quantised 1x128 as the released model does. The weight is kept so if
            `precision` says it and each part begins with a block of its own; else it was dequantised at load
    """

    def __init__(self, in_features: int, parts: dict[str, int], *, fp8: bool, precision: Precision) -> None:
        super().__init__()
        self.parts = parts
        self.fp8 = fp8
        self.dtype = precision.dtype
        rows = sum(parts.values())
        self.scale: nn.Parameter | None = None
        if fp8 and precision.keep_fp8 and not any(size % BLOCK for size in [*parts.values()][:-1]):
            self.weight = weight(rows, in_features, dtype=torch.float8_e4m3fn)
            self.scale = weight(*scale_shape((rows, in_features)))
        else:
            self.weight = weight(rows, in_features, dtype=precision.dtype)

    @property
    def takes_fp8(self) -> bool:
        """True if it multiplies FP8 rows: `Activation.fp8` is what it wants."""
        return self.scale is not None

    def forward(self, x: Activation) -> Tensor:
        """[T, in] -> [T, out] in the model's dtype."""
        if self.scale is not None:
            rows = x.fp8 if x.fp8 is not None else quantize_1x128(_given(x.plain))
            return fp8_gemm(rows, self.weight, self.scale, self.dtype)
        plain = _given(x.plain)
        return fp8_linear_dequantized(plain, self.weight) if self.fp8 else linear(plain, self.weight)

    def targets(self, prefix: str) -> Iterator[Target]:
        row = 0
        for name, rows in self.parts.items():
            dest = self.weight.data[row : row + rows]
            if self.scale is None:
                yield Target(f"{prefix}{name}.weight", tuple(dest.shape), dest, "linear" if self.fp8 else "plain")
            else:
                blocks = scale_shape((row + rows, self.weight.shape[1]))[0]
                yield from block_targets(f"{prefix}{name}.weight", dest, self.scale.data[row // BLOCK : blocks])
            row += rows


def _given(x: Tensor | None) -> Tensor:
    assert x is not None, "this layer reads rows that are not quantised"
    return x


def block_targets(name: str, dest: Tensor, scale: Tensor) -> Iterator[Target]:
    """A weight that stays FP8, and its scales."""
    yield Target(name, tuple(dest.shape), dest, "plain")
    yield Target(name + SCALE_SUFFIX, tuple(scale.shape), scale, "plain")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = weight(size)
        self.eps = eps

    def forward(self, x: Tensor, reader: Linear) -> Activation:
        """The norm of x [T, size], in the form that its only reader takes."""
        if reader.takes_fp8:
            return Activation(None, rms_norm_quant(x, self.weight, self.eps))
        return Activation(rms_norm(x, self.weight, self.eps))

    def add(self, x: Tensor, residual: Tensor | None, *, fp8: bool) -> tuple[Activation, Tensor]:
        """The norm of x + residual, also quantised if `fp8`, and that sum, [T, size] each; of x alone without one."""
        if fp8:
            normed, rows, total = add_rms_norm_quant(x, residual, self.weight, self.eps)
            return Activation(normed, rows), total
        normed, total = add_rms_norm(x, residual, self.weight, self.eps)
        return Activation(normed), total

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}.weight", tuple(self.weight.shape), self.weight.data, "plain")


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(vocab_size, hidden_size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden]."""
        return embed(self.weight, ids)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}.weight", tuple(self.weight.shape), self.weight.data, "plain")
