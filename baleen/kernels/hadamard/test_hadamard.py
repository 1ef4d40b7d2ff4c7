"""hadamard against the recursive definition of the Sylvester matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.hadamard import IMPLEMENTATIONS, hadamard
from baleen.kernels.hadamard.cases import CASES
from baleen.kernels.testing import Case, check


def _sylvester(dim: int) -> np.ndarray:
    if dim == 1:
        return np.ones((1, 1))
    half = _sylvester(dim // 2)
    return np.block([[half, half], [half, -half]])


def _transform(x: Tensor) -> np.ndarray:
    return x.double().numpy() @ _sylvester(x.shape[-1]).T / np.sqrt(x.shape[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_the_sylvester_recursion(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _transform)


def test_it_is_orthonormal_and_its_own_inverse() -> None:
    matrix = hadamard(torch.eye(128))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(128), rtol=0, atol=1e-6)
    x = torch.randn(5, 128)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=2e-6)


def test_it_keeps_dot_products_and_spreads_an_outlier() -> None:
    q, k = torch.randn(4, 128), torch.randn(6, 128)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T, rtol=0, atol=2e-5)
    spike = torch.zeros(128)
    spike[17] = 128**0.5
    assert torch.allclose(hadamard(spike).abs(), torch.ones(128))


def test_dtype_stays() -> None:
    assert hadamard(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [0, 3, 96])
def test_a_dim_that_is_no_power_of_two_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(2, dim))
