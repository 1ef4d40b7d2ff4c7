"""fp8_gemm against a float64 loop over blocks, with both scales applied per block as the report has it."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.fp8_gemm import IMPLEMENTATIONS, fp8_gemm, fp8_linear_dequantized, reference
from baleen.kernels.fp8_gemm.cases import CASES
from baleen.kernels.fp8_quant import (
    Quantized,
    dequantize_1x128,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x128,
)
from baleen.kernels.testing import Case, assert_close, check, largest_scratch, run_in_interpreter


def _block_loop(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> np.ndarray:
    values, row_scales = x.values.double().numpy(), x.scale.double().numpy()
    scales, w8 = weight_scale_inv.double().numpy(), weight.double().numpy()
    out = np.zeros((x.values.shape[0], weight.shape[0]))
    for n, kb in np.ndindex(*scales.shape):
        rows, cols = slice(n * 128, (n + 1) * 128), slice(kb * 128, (kb + 1) * 128)
        out[:, rows] += scales[n, kb] * row_scales[:, kb, None] * (values[:, cols] @ w8[rows, cols].T)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_a_block_loop(implementation: str, case: Case) -> None:
    """On a CPU, without tensor cores, only float32 sums and the result's own rounding are between them."""
    exact = replace(case, rtol=0.0 if torch.float32 in case.parameters else 2**-8, atol=1e-4)
    check(IMPLEMENTATIONS, implementation, exact, _block_loop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_a_block_loop(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _block_loop, device="cuda")


@pytest.mark.parametrize("wrong", ["a block left out", "a neighbour's scale of the weight", "another row's scale"])
@pytest.mark.parametrize("case", [case for case in CASES if case.parameters[0] > 1 and case.parameters[2] > 128])
def test_the_tolerance_shows_an_error(case: Case, wrong: str) -> None:
    """The cases allow what tensor cores round; they must not allow more."""
    (values, scale), weight, weight_scale, dtype = case.arguments()
    broken_scale, broken_weight_scale = scale.clone(), weight_scale.clone()
    if wrong == "a block left out":
        broken_scale[:, -1] = 0
    elif wrong == "another row's scale":
        broken_scale = scale.roll(1, 0)
    else:
        broken_weight_scale = weight_scale.roll(1, 1)
    if torch.equal(scale, broken_scale) and torch.equal(weight_scale, broken_weight_scale):
        pytest.skip("these scales are alike")
    got = fp8_gemm(Quantized(values, broken_scale), weight, broken_weight_scale, dtype)
    expected = torch.from_numpy(_block_loop(*case.arguments()))
    with pytest.raises(AssertionError):
        assert_close(got, expected, case.rtol, case.atol)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_the_triton_kernel_in_its_interpreter() -> None:
    """Its tests once more, where Triton interprets its kernels: that is chosen at import."""
    run_in_interpreter(__file__, "triton and (loop or parts)")


@pytest.mark.parametrize(
    "config", [(16, 64, 1), (16, 64, 3), (16, 128, 7), (16, 256, 2), (32, 64, 11), (64, 128, 2), (128, 256, 1)]
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 320, 896), (21, 320, 896), (100, 200, 1408)])
def test_parts_of_k_and_tiles_of_any_size_in_triton(m: int, n: int, k: int, config: tuple[int, ...]) -> None:
    """Rows of the weight and of x that fill no tile, more parts than the last program adds at a time; the result is the
    same each time, and the counters are zeros again."""
    triton_kernel = pytest.importorskip("baleen.kernels.fp8_gemm.triton_kernel", reason="needs the package triton")
    runs_here = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs_here:
        pytest.skip("needs a CUDA device or Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = replace(CASES[0], parameters=(m, n, k, torch.float32))
    (values, scale), weight, weight_scale, _ = case.arguments()
    arguments = (Quantized(values.to(device), scale.to(device)), weight.to(device), weight_scale.to(device))
    results = [triton_kernel.fp8_gemm(*arguments, torch.float32, triton_kernel.Config(*config)) for _ in range(2)]
    expected = torch.from_numpy(_block_loop(*case.arguments()))
    assert_close(results[0].cpu(), expected, case.rtol, case.atol)
    assert torch.equal(results[0], results[1])
    assert not bool(triton_kernel.counters_of(arguments[0].values.device).zeros.any())


def test_counters_are_taken_in_turn() -> None:
    triton_kernel = pytest.importorskip("baleen.kernels.fp8_gemm.triton_kernel", reason="needs the package triton")
    counters = triton_kernel.Counters(torch.device("cpu"))
    counts = [300, 576, 1] * 200
    starts = [counters.take(count).storage_offset() for count in counts]
    for (start, after), count in zip(pairwise(starts), counts):
        assert after in (start + count, 0)
        assert start + count <= len(counters.zeros)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dequantized_weight_gives_the_same_numbers(case: Case) -> None:
    x, weight, scale, dtype = case.arguments()
    rows = dequantize_1x128(*x).to(dtype)
    direct = fp8_gemm(x, weight, scale, dtype)
    by_weight = fp8_linear_dequantized(rows, dequantize_128x128(weight, scale))
    assert direct.dtype == by_weight.dtype == dtype
    torch.testing.assert_close(by_weight, direct, rtol=0 if dtype == torch.float32 else 2**-7, atol=2e-4)


def test_a_bfloat16_weight_loses_nothing_but_the_result_s_rounding() -> None:
    """e4m3 times a power of two is exact in bfloat16, for the weight and for the activations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, generator=generator).bfloat16()
    weight = dequantize_128x128(*quantize_128x128(torch.randn(200, 300, generator=generator)))
    out = fp8_linear_dequantized(x, weight.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fp8_linear_dequantized(x.float(), weight), rtol=2**-8, atol=1e-4)


def test_no_rows() -> None:
    x, weight, scale, dtype = CASES[0].arguments()
    assert fp8_gemm(Quantized(x.values[:0], x.scale[:0]), weight, scale, dtype).shape == (0, 128)


def test_chunks_of_the_weight_change_nothing_and_bound_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = torch.randn(700, 256).to(torch.float8_e4m3fn), torch.rand(6, 2)
    arguments: tuple[Any, ...] = (quantize_1x128(torch.randn(2, 256)), weight, scale, torch.float32)
    whole = fp8_gemm(*arguments)
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 2 * 128 * 256 * 4)
    torch.testing.assert_close(fp8_gemm(*arguments), whole, rtol=1e-6, atol=1e-5)
    assert largest_scratch(fp8_gemm, *arguments) == 2 * 128 * 256 * 4
