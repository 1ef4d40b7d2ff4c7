"""Linear layers and norms of the training network, with the rounding of the FP8 checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fake_fp8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x rounded to e4m3 with power-of-two scales over blocks of 128 in the last `len(dims)` dims; gradient 1."""
    with torch.no_grad():
        shape = x.shape
        padded = F.pad(x.float(), [p for d in reversed(shape[-len(dims) :]) for p in (0, -d % 128)])
        blocks = padded.unflatten(-1, (-1, 128))
        if len(dims) == 2:
            blocks = blocks.unflatten(-3, (-1, 128))
            amax = blocks.abs().amax((-1, -3), keepdim=True)
        else:
            amax = blocks.abs().amax(-1, keepdim=True)
        scale = torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-4) / 448.0)))
        rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
        if len(dims) == 2:
            rounded = rounded.flatten(-4, -3)
        rounded = rounded.flatten(-2)
        rounded = rounded[(..., *(slice(d) for d in shape[-len(dims) :]))].to(x.dtype)
    return x + (rounded - x).detach()


class Linear(nn.Linear):
    """Without bias. With `fp8` set, weight and input are rounded as the FP8 checkpoint's will be (straight-through)."""

    fp8 = False
    fp8_input = True
    fp8_weight = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fp8:
            return F.linear(x, self.weight)
        weight = fake_fp8(self.weight, (-2, -1)) if self.fp8_weight else self.weight
        return F.linear(fake_fp8(x, (-1,)) if self.fp8_input else x, weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
