"""The rope tables, built once per process, and the two rotations in torch.

The tables are computed in fp32 throughout, angle included, as the released model was trained and run: at position
100,000 an fp64 angle would differ by some 1e-3 rad.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_table(max_positions: int, rope_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of unscaled rope: each [max_positions, rope_dim/2] float32; frequency i is theta^(-2i/rope_dim)."""
    return _angles(max_positions, 1.0 / _wavelengths(rope_dim, theta))


def yarn_table(
    max_positions: int,
    rope_dim: int,
    theta: float,
    *,
    factor: float,
    original_max_positions: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 1.0,
    mscale_all_dim: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """cos and sin of YaRN rope: frequencies that turn often in the original context stay, slow ones are divided.

    max_positions           rows of the table (163840 in the released model), not the original context
    original_max_positions  tokens of the context the model was first trained on (4096)
    beta_fast, beta_slow    turns within the original context above which a frequency stays, below which it is divided;
                            between them a linear ramp over the frequency's index
    mscale, mscale_all_dim  amplitude of the table: the ratio of both attention factors (1 when they are equal)
    returns                 cos, sin, each [max_positions, rope_dim/2] float32
    Source:                 YaRN, arXiv 2309.00071, section 3.2; DeepSeek-V3.2-Exp inference/model.py.
    """

    def index_of(turns: float) -> float:
        return rope_dim * math.log(original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(beta_fast)), 0)
    high = min(math.ceil(index_of(beta_slow)), rope_dim - 1)
    # A ramp of no width would divide by zero; this one is a step.
    width = max(high - low, 0.001)
    kept = 1 - ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    wavelengths = _wavelengths(rope_dim, theta)
    # Rounded in the order of DeepSeek's code: at position 1,000 another order shows in the sixth decimal.
    frequencies = 1 / (factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept
    amplitude = _attention_factor(factor, mscale) / _attention_factor(factor, mscale_all_dim)
    cos, sin = _angles(max_positions, frequencies)
    return cos * amplitude, sin * amplitude


def _wavelengths(rope_dim: int, theta: float) -> Tensor:
    return theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)


def _angles(max_positions: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _attention_factor(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # As complex numbers: strided reads of even and odd elements take ten times as long on a CPU.
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(*_broadcast(x, cos, sin))).flatten(-2).to(x.dtype)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = _broadcast(x, cos, sin)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _broadcast(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[T, D/2] -> [T, 1, ..., D/2], one 1 for each dim of x between tokens and head dim."""
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[1],)
    return cos.view(shape), sin.view(shape)
