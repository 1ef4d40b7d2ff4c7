"""rms_norm against numpy in float64, and transformers' module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RMSNorm

from baleen.kernels.dispatch import available
from baleen.kernels.rms_norm import IMPLEMENTATIONS, add_rms_norm, rms_norm
from baleen.kernels.rms_norm.cases import CASES, EPS
from baleen.kernels.testing import Case, check


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    rows, scale = x.double().numpy(), weight.double().numpy()
    return np.stack([scale * row / np.sqrt(np.mean(row * row) + eps) for row in rows])


def _add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    total = torch.from_numpy(x.double().numpy() + residual.double().numpy()).to(x.dtype)
    return _norm(total, weight, eps), total


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_float64(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, {"rms_norm": _norm, "add_rms_norm": _add}[case.function])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    x = torch.ones(2, 8, dtype=dtype)
    assert rms_norm(x, torch.ones(8), EPS).dtype == dtype
    normed, total = add_rms_norm(x, x, torch.ones(8), EPS)
    assert (normed.dtype, total.dtype) == (dtype, dtype)


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
