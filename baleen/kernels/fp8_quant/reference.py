"""FP8 block quantisation in torch. Scales are made of exponent bits, so they are exact powers of two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.fp8_quant import Quantized

BLOCK = 128
FP8_MAX = 448.0
AMAX_FLOOR = 1e-4


def _int32(value: int) -> Tensor:
    # A Python number in a bitwise operation is made a tensor each time, which takes longer than the operation on a row.
    return torch.tensor(value, dtype=torch.int32)


_EXPONENT = _int32(0x7F800000)
_MANTISSA = _int32(0x7FFFFF)
_ROUNDING = _int32((20 << 23) | (1 << 22))
_CODE_SHIFT = torch.tensor(1 << 7, dtype=torch.int16)
_CODE_BITS = torch.tensor(~0x4000, dtype=torch.int16)
_MAGNITUDE = torch.tensor(0x7F, dtype=torch.int8)


def quantize_1x128(x: Tensor) -> Quantized:
    blocks = _blocks(x)
    scale = _scale(blocks.abs().amax(-1, keepdim=True))
    values = _unblock(blocks * scale.reciprocal(), x.shape[-1])
    return Quantized(values.to(torch.float8_e4m3fn), scale.squeeze(-1))


def dequantize_1x128(values: Tensor, scale: Tensor) -> Tensor:
    dim = values.shape[-1]
    if scale.shape[-1] != -(-dim // BLOCK):
        raise ValueError(f"fp8_quant: {scale.shape[-1]} scales for {dim} values, expected {-(-dim // BLOCK)}")
    return _unblock(_blocks(values).mul_(scale[..., None]), dim)


def round_1x128(x: Tensor) -> Tensor:
    # Five times as fast as two casts. Adding and taking away 1.5 * 2^(e+20) rounds a float32 of exponent e to the 3
    # mantissa bits of e4m3, ties to even; exponents below -6, its smallest, all round to multiples of 2^-9.
    blocks = _blocks(x)
    scale = _scale(blocks.abs().amax(-1, keepdim=True))
    scaled = blocks * scale.reciprocal()
    exponent = scaled.view(torch.int32) & _EXPONENT
    magic = exponent.clamp_(min=(127 - 6) << 23).add_(_ROUNDING).view(torch.float32)
    return _unblock(scaled.add_(magic).sub_(magic).mul_(scale), x.shape[-1]).to(x.dtype)


def quantize_128x128(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    padded = F.pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = _scale(blocks.abs().amax((1, 3)))
    values = (blocks * scale.reciprocal()[:, None, :, None]).flatten(2).flatten(0, 1)
    return values[:rows, :cols].to(torch.float8_e4m3fn), scale


def dequantize_128x128(weight: Tensor, weight_scale_inv: Tensor) -> Tensor:
    rows, cols = weight.shape
    expected = (-(-rows // BLOCK), -(-cols // BLOCK))
    if tuple(weight_scale_inv.shape) != expected:
        raise ValueError(f"fp8_quant: weight_scale_inv is {list(weight_scale_inv.shape)}, expected {list(expected)}")
    out = widen(weight)
    by_column = weight_scale_inv.float().repeat_interleave(BLOCK, 1)[:, :cols]
    full = rows // BLOCK
    out[: full * BLOCK].unflatten(0, (full, BLOCK)).mul_(by_column[:full, None])
    if full * BLOCK < rows:
        out[full * BLOCK :].mul_(by_column[full])
    return out


def widen(values: Tensor) -> Tensor:
    """float8_e4m3fn -> float32 of the same shape, exactly; on a CPU seven times faster than the cast.

    The codes moved up by 7 bits, sign to the top, are the float16 of value / 2^8, subnormals included; only NaN, code
    0x7f, would become 480. Elsewhere it is the cast: a look at the values would wait for the device.
    """
    if values.device.type != "cpu":
        return values.float()
    codes = values.view(torch.int8)
    halves = codes.to(torch.int16).mul_(_CODE_SHIFT).bitwise_and_(_CODE_BITS).view(torch.float16)
    out = halves.float().mul_(2.0**8)
    magnitudes = codes & _MAGNITUDE
    if magnitudes.numel() and int(magnitudes.amax()) == 0x7F:
        out.masked_fill_(magnitudes == 0x7F, torch.nan)
    return out


def _blocks(x: Tensor) -> Tensor:
    """[..., K] -> float32 [..., ceil(K/128), 128], zeros after the end: they change no amax."""
    x = widen(x) if x.dtype == torch.float8_e4m3fn else x.float()
    missing = -x.shape[-1] % BLOCK
    if missing:
        x = F.pad(x, (0, missing))
    return x.unflatten(-1, (-1, BLOCK))


def _unblock(blocks: Tensor, dim: int) -> Tensor:
    return blocks.flatten(-2)[..., :dim]


def _scale(amax: Tensor) -> Tensor:
    """2^ceil(log2(max(amax, floor) / 448)); inf for NaN and inf. Adding all mantissa bits carries into the exponent
    if any of them was set."""
    bits = amax.clamp(min=AMAX_FLOOR).div_(FP8_MAX).view(torch.int32)
    return bits.clamp_(max=0x7F800000).add_(_MANTISSA).bitwise_and_(_EXPONENT).view(torch.float32)
