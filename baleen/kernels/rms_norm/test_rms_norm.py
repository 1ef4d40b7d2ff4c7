"""The norms against numpy in float64, and transformers' module; FP8 by fp8_quant, which is held to its bits there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RMSNorm

from baleen.kernels.dispatch import available, find
from baleen.kernels.fp8_quant import Quantized, quantize_1x128
from baleen.kernels.rms_norm import IMPLEMENTATIONS, add_rms_norm, add_rms_norm_quant, rms_norm, rms_norm_quant
from baleen.kernels.rms_norm.cases import CASES, EPS
from baleen.kernels.testing import Case, check, run_in_interpreter


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    rows, scale = x.double().numpy(), weight.double().numpy()
    return np.stack([scale * row / np.sqrt(np.mean(row * row) + eps) for row in rows])


def _add(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
    if residual is None:
        return _norm(x, weight, eps), x
    total = torch.from_numpy(x.double().numpy() + residual.double().numpy()).to(x.dtype)
    return _norm(total, weight, eps), total


def _norm_quant(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Quantized:
    return quantize_1x128(torch.from_numpy(_norm(x, weight, eps)).to(x.dtype))


def _add_quant(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
    normed, total = _add(x, residual, weight, eps)
    return normed, quantize_1x128(torch.from_numpy(normed).to(x.dtype)), total


ORACLES = {
    "rms_norm": _norm,
    "add_rms_norm": _add,
    "rms_norm_quant": _norm_quant,
    "add_rms_norm_quant": _add_quant,
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_float64(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function])


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_leading_dims(implementation: str) -> None:
    """Rows of three dims, one each of the two that a tensor of heads has transposed."""
    x, weight = torch.randn(3, 4, 130).bfloat16().transpose(0, 1), torch.randn(130)
    norm, quant = (find(IMPLEMENTATIONS, implementation, name) for name in ("rms_norm", "rms_norm_quant"))
    assert norm is not None
    assert quant is not None
    assert torch.equal(norm(x, weight, EPS), norm(x.contiguous().view(12, 130), weight, EPS).view(4, 3, 130))
    values, scale = quant(x, weight, EPS)
    by_row = quant(x.contiguous().view(12, 130), weight, EPS)
    assert torch.equal(values.float(), by_row.values.float().view(4, 3, 130))
    assert torch.equal(scale, by_row.scale.reshape(4, 3, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The float32 cases once more, where Triton interprets its kernels: that is chosen at import. It rounds to bfloat16
    and FP8 otherwise than a GPU."""
    run_in_interpreter(__file__, "triton and float32-float32 and not quant")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    x = torch.ones(2, 8, dtype=dtype)
    assert rms_norm(x, torch.ones(8), EPS).dtype == dtype
    normed, total = add_rms_norm(x, x, torch.ones(8), EPS)
    assert (normed.dtype, total.dtype) == (dtype, dtype)
    assert rms_norm_quant(x, torch.ones(8), EPS).values.dtype == torch.float8_e4m3fn
    assert [leaf.dtype for leaf in add_rms_norm_quant(x, x, torch.ones(8), EPS)[::2]] == [dtype, dtype]


def test_equals_transformers() -> None:
    oracle = DeepseekV32RMSNorm(96, eps=EPS)
    oracle.weight.data = torch.randn(96)
    x = torch.randn(7, 96)
    torch.testing.assert_close(rms_norm(x, oracle.weight.data, EPS), oracle(x).detach(), rtol=1e-6, atol=1e-6)


def test_the_arguments_of_add_are_left_alone() -> None:
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    before = residual.clone()
    add_rms_norm(x, residual, torch.ones(16), EPS)
    assert torch.equal(residual, before)
