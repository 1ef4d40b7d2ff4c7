"""FP8 quantisation against e4m3 by the bit: scales in exact rationals, values by search in the table of all codes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available, find
from baleen.kernels.fp8_quant import (
    IMPLEMENTATIONS,
    dequantize_1x128,
    dequantize_128x128,
    empty_scale,
    quantize_1x128,
    quantize_128x128,
    round_1x128,
)
from baleen.kernels.fp8_quant.cases import CASES
from baleen.kernels.testing import Case, assert_few_flips, check


def _decode(code: int) -> float:
    """OCP FP8 E4M3: sign, 4 exponent bits with bias 7, 3 mantissa bits; codes 0x7f and 0xff are NaN."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 0x80 else magnitude


MAGNITUDES = np.array([_decode(code) for code in range(0x7F)])


def _encode(values: np.ndarray) -> np.ndarray:
    """Nearest e4m3 value, ties to the even code, as float64."""
    magnitude = np.abs(values)
    above = np.clip(np.searchsorted(MAGNITUDES, magnitude), 1, len(MAGNITUDES) - 1)
    low, high = MAGNITUDES[above - 1], MAGNITUDES[above]
    up = (high - magnitude < magnitude - low) | ((high - magnitude == magnitude - low) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def _scale(block: np.ndarray) -> float:
    """The smallest power of two with which the block's maximum, or the floor, fits into 448: in exact rationals."""
    amax = max(Fraction(float(np.max(np.abs(block), initial=0.0))), Fraction(float(np.float32(1e-4))))
    exponent = -40
    while Fraction(2) ** exponent * 448 < amax:
        exponent += 1
    return 2.0**exponent


def _quantize(x: np.ndarray, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = x.shape
    scale = np.zeros((-(-rows // block_rows), -(-cols // 128)))
    values = np.zeros(x.shape)
    for i, j in np.ndindex(scale.shape):
        block = np.s_[i * block_rows : (i + 1) * block_rows, j * 128 : (j + 1) * 128]
        scale[i, j] = _scale(x[block])
        values[block] = _encode(x[block] / scale[i, j])
    return values, scale


def _quantize_1x128(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values, scale = _quantize(x.double().numpy().reshape(-1, x.shape[-1]), 1)
    return values.reshape(x.shape), scale.reshape(*x.shape[:-1], scale.shape[1])


def _multiply(values: Tensor, scale: Tensor, block_rows: int) -> np.ndarray:
    flat = values.float().double().numpy().reshape(-1, values.shape[-1])
    scales = scale.double().numpy().reshape(-1, scale.shape[-1])
    out = np.zeros(flat.shape)
    for i, j in np.ndindex(flat.shape):
        out[i, j] = flat[i, j] * scales[i // block_rows, j // 128]
    return out.reshape(values.shape)


def _round_1x128(x: Tensor) -> np.ndarray:
    values, scale = _quantize_1x128(x)
    return values * np.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]


ORACLES = {
    "quantize_1x128": _quantize_1x128,
    "round_1x128": _round_1x128,
    "dequantize_1x128": lambda values, scale: _multiply(values, scale, 1),
    "quantize_128x128": lambda weight: _quantize(weight.double().numpy(), 128),
    "dequantize_128x128": lambda weight, scale: _multiply(weight, scale, 128),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_bits(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function])


def test_scale_at_the_edges() -> None:
    """448 fits into scale 1, the next float32 does not; nothing goes below the floor's scale."""
    amax = torch.tensor([448.0, 448.0 + 2**-15, 448.0 - 2**-15, 224.0, 0.0, 1e-4, 3.5, 3.5 * (1 + 2**-22), 1e30])
    scale = quantize_1x128(amax[:, None])[1].squeeze(1)
    floor = 2.0**-22
    while floor * 448 < 1e-4:
        floor *= 2
    assert scale[:8].tolist() == [1.0, 2.0, 1.0, 0.5, floor, floor, 2.0**-7, 2.0**-6]
    mantissas, _ = torch.frexp(scale)
    assert bool((mantissas == 0.5).all())


@pytest.mark.parametrize("num_rows", [1, 3, 4, 129])
def test_columns_of_scales_are_multiples_of_16_bytes(num_rows: int) -> None:
    scale = empty_scale(num_rows, 56, torch.device("cpu"))
    assert (scale.shape, scale.dtype) == ((num_rows, 56), torch.float32)
    assert scale.stride(0) == 1
    assert scale.stride(1) * 4 % 16 == 0
    assert num_rows <= scale.stride(1) < num_rows + 4


def test_error_bound() -> None:
    """Half a unit of the last of 3 mantissa bits: 2^-4 of the value; half a unit of the subnormals below s * 2^-6."""
    x = torch.randn(200, 576) * torch.exp(3 * torch.randn(200, 1))
    values, scale = quantize_1x128(x)
    assert values.dtype == torch.float8_e4m3fn
    assert values.shape == x.shape
    assert scale.shape == (200, 5)
    spread = scale.repeat_interleave(128, 1)[:, :576].double()
    error = (dequantize_1x128(values, scale).double() - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs() * 2**-4, spread * 2**-10)).all())


def test_the_fast_rounding_agrees_with_the_cast_on_every_exponent_and_tie() -> None:
    mantissas = torch.arange(0, 1 << 23, 1 << 15, dtype=torch.int32)
    near_ties = torch.cat((mantissas, mantissas + 1, mantissas + (1 << 15) - 1))
    bits = (torch.arange(100, 136, dtype=torch.int32)[:, None] << 23) + near_ties
    x = bits.view(torch.float32).flatten()
    x = x[x <= 448]
    # 448 in each block makes the scale 1.
    x = torch.nn.functional.pad(x, (0, -x.numel() % 127)).view(-1, 127)
    x = torch.cat((x, torch.full((x.shape[0], 1), 448.0)), 1)
    for signed in (x, -x):
        assert torch.equal(round_1x128(signed), signed.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_a_block_with_a_bad_value_is_bad_as_a_whole_and_alone(implementation: str, bad: float, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.ones(2, 256)
    x[0, 5] = bad
    quantize = find(IMPLEMENTATIONS, implementation, "quantize_1x128")
    assert quantize is not None
    values, scale = (part.cpu() for part in quantize(x.to(device)))
    assert scale.tolist() == [[float("inf"), 2.0**-8], [2.0**-8, 2.0**-8]]
    for result in (dequantize_1x128(values, scale), round_1x128(x)):
        assert bool(result[0, :128].isnan().all())
        assert torch.equal(result[0, 128:], x[0, 128:])
        assert torch.equal(result[1], x[1])


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_every_code_dequantizes_to_its_value(scale: float) -> None:
    codes = torch.arange(256).to(torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    expected = torch.tensor([_decode(code) for code in range(256)]).view(2, 128) * scale
    by_row = dequantize_1x128(codes, torch.full((2, 1), scale))
    by_block = dequantize_128x128(codes, torch.full((1, 1), scale))
    for got in (by_row, by_block):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])


def test_weights_round_trip_within_the_bound_and_exactly_the_second_time() -> None:
    weight = torch.randn(192, 300)
    values, scale = quantize_128x128(weight)
    assert scale.shape == (2, 3)
    once = dequantize_128x128(values, scale)
    assert bool(((once - weight).abs() <= torch.maximum(weight.abs() * 2**-4, scale.max() * 2**-10)).all())
    again, scale_again = quantize_128x128(once)
    assert torch.equal(dequantize_128x128(again, scale_again), once)


def test_scales_of_the_wrong_shape_are_refused() -> None:
    weight = torch.zeros(576, 256).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\[4, 2\].*\[5, 2\]"):
        dequantize_128x128(weight, torch.ones(4, 2))
    with pytest.raises(ValueError, match="expected 2"):
        dequantize_1x128(weight, torch.ones(576, 3))


def test_flips_are_allowed_up_to_their_share_and_a_step() -> None:
    values, scale = quantize_1x128(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) + 3)
    codes = values.view(torch.uint8).clone()
    assert_few_flips(values, values, 0.0, scale, scale)
    # The same numbers with a block's scale doubled.
    halved, doubled = values.float(), scale.clone()
    halved[2, 128:] /= 2
    doubled[2, 1] *= 2
    assert_few_flips(halved.to(values.dtype), values, 0.01, doubled, scale)
    with pytest.raises(AssertionError, match="off"):
        assert_few_flips(values, values, 0.01, doubled, scale)
    for flipped, allowed in ((10, True), (11, False)):
        moved = codes.clone()
        moved[0, :flipped] += 1
        if allowed:
            assert_few_flips(moved.view(values.dtype), values, 10 / 1024, scale, scale)
            continue
        with pytest.raises(AssertionError, match="11 of 1024"):
            assert_few_flips(moved.view(values.dtype), values, 10 / 1024, scale, scale)
    for wrong in (2, 0x7F - int(codes[3, 5])):  # two steps off, and NaN
        moved = codes.clone()
        moved[3, 5] += wrong
        with pytest.raises(AssertionError, match="more than a step"):
            assert_few_flips(moved.view(values.dtype), values, 0.01, scale, scale)
