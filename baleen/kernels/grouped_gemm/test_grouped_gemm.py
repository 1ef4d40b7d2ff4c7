"""grouped_gemm against numpy row by row, SwiGLU against its formula in float64; FP8 by fp8_quant, which is held to its
bits there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.fp8_quant import Quantized, quantize_1x128
from baleen.kernels.grouped_gemm import IMPLEMENTATIONS, grouped_gemm, silu_and_mul
from baleen.kernels.grouped_gemm.cases import CASES
from baleen.kernels.testing import Case, check, run_in_interpreter


def _row_by_row(x: Tensor, weight: Tensor, counts: Sequence[int] | Tensor) -> np.ndarray:
    experts = [expert for expert, count in enumerate(counts) for _ in range(int(count))]
    rows = [weight[e].double().numpy() @ row for e, row in zip(experts, x.double().numpy(), strict=True)]
    return np.array(rows).reshape(x.shape[0], weight.shape[1])


def _swiglu(x: Tensor) -> np.ndarray:
    gate, up = np.split(x.double().numpy(), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def _swiglu_quant(x: Tensor) -> Quantized:
    return quantize_1x128(torch.from_numpy(_swiglu(x)).to(x.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_numpy(implementation: str, case: Case) -> None:
    oracles = {"grouped_gemm": _row_by_row, "silu_and_mul": _swiglu, "silu_and_mul_quant": _swiglu_quant}
    check(IMPLEMENTATIONS, implementation, case, oracles[case.function])


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The float32 cases once more, where Triton interprets its kernels: that is chosen at import. It rounds to bfloat16
    and FP8 otherwise than a GPU."""
    run_in_interpreter(__file__, "triton and silu and float32 and not quant")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_torch_silu(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    out = silu_and_mul(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, (F.silu(x[:, :3].float()) * x[:, 3:].float()).to(dtype))
    assert grouped_gemm(x, torch.ones(1, 2, 6, dtype=dtype), [4]).dtype == dtype


def test_the_input_of_swiglu_is_left_alone() -> None:
    x = torch.randn(2, 8)
    before = x.clone()
    silu_and_mul(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("counts", [[2, 1], [1, 1, 1, 1], [1, 1]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="grouped_gemm"):
        grouped_gemm(torch.zeros(3, 4), torch.zeros(3, 2, 4), counts)
