"""fp8_gemm against a float64 loop over blocks, with both scales applied per block as the report has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.fp8_gemm import IMPLEMENTATIONS, fp8_gemm, fp8_linear_dequantized, reference
from baleen.kernels.fp8_gemm.cases import CASES
from baleen.kernels.fp8_quant import dequantize_128x128, quantize_128x128
from baleen.kernels.testing import Case, check, largest_scratch


def _block_loop(x: Tensor, weight: Tensor, weight_scale_inv: Tensor) -> np.ndarray:
    activations, scales = x.double().numpy(), weight_scale_inv.double().numpy()
    out = np.zeros((x.shape[0], weight.shape[0]))
    for m in range(x.shape[0]):
        for kb in range(scales.shape[1]):
            run = activations[m, kb * 128 : (kb + 1) * 128]
            sx = 2.0 ** np.ceil(np.log2(max(np.abs(run).max(), 1e-4) / 448))
            x8 = torch.from_numpy(run / sx).to(torch.float8_e4m3fn).double().numpy()
            for nb in range(scales.shape[0]):
                w8 = weight[nb * 128 : (nb + 1) * 128, kb * 128 : (kb + 1) * 128].float().double().numpy()
                out[m, nb * 128 : (nb + 1) * 128] += sx * scales[nb, kb] * (w8 @ x8)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_a_block_loop(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _block_loop)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dequantized_weight_gives_the_same_numbers(case: Case) -> None:
    x, weight, scale = case.arguments()
    direct = fp8_gemm(x, weight, scale)
    by_weight = fp8_linear_dequantized(x, dequantize_128x128(weight, scale))
    assert direct.dtype == by_weight.dtype == x.dtype
    torch.testing.assert_close(by_weight, direct, rtol=0 if x.dtype == torch.float32 else 2**-7, atol=2e-4)


def test_a_bfloat16_weight_loses_nothing_but_the_result_s_rounding() -> None:
    """e4m3 times a power of two is exact in bfloat16, for the weight and for the activations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, generator=generator).bfloat16()
    weight = dequantize_128x128(*quantize_128x128(torch.randn(200, 300, generator=generator)))
    out = fp8_linear_dequantized(x, weight.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fp8_linear_dequantized(x.float(), weight), rtol=2**-8, atol=1e-4)


def test_leading_dims_are_kept() -> None:
    x, weight, scale = CASES[0].arguments()
    stacked = torch.stack((x, 2 * x)).unsqueeze(1)
    assert fp8_gemm(stacked, weight, scale).shape == (2, 1, 1, 128)
    assert fp8_linear_dequantized(stacked, dequantize_128x128(weight, scale)).shape == (2, 1, 1, 128)


def test_chunks_of_the_weight_change_nothing_and_bound_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale = torch.randn(2, 256), torch.randn(700, 256).to(torch.float8_e4m3fn), torch.rand(6, 2)
    whole = fp8_gemm(x, weight, scale)
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 2 * 128 * 256 * 4)
    torch.testing.assert_close(fp8_gemm(x, weight, scale), whole, rtol=1e-6, atol=1e-5)
    assert largest_scratch(fp8_gemm, x, weight, scale) == 2 * 128 * 256 * 4
