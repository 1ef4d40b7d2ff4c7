"""The per-head products against sums in float64, rounded and quantised where the contract says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available, find
from baleen.kernels.fp8_quant import dequantize_1x128
from baleen.kernels.head_values import IMPLEMENTATIONS
from baleen.kernels.head_values.cases import CASES, exact
from baleen.kernels.testing import Case, check, run_in_interpreter


def _head_values(attended: Tensor, w_v: Tensor) -> Tensor:
    return torch.einsum("thc,hvc->thv", attended.double(), w_v.double()).to(attended.dtype)


def _head_values_quant(attended: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor]:
    rows = _head_values(attended, w_v).flatten(1).double()
    values, scales = [], []
    for block in rows.split(128, dim=1):
        amax = block.abs().amax(1).clamp_min(float(np.float32(1e-4))) if block.numel() else block.new_zeros(0)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
        values.append((block / scale[:, None]).float().to(torch.float8_e4m3fn))
        scales.append(scale.float())
    return torch.cat(values, 1), torch.stack(scales, 1)


def _part_values_quant(sums: Tensor, maxima: Tensor, totals: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor]:
    factors = torch.exp2(maxima.double() - maxima.double().amax(1, keepdim=True))
    joined = torch.einsum("tph,tphl->thl", factors, sums.double())
    joined /= torch.einsum("tph,tph->th", factors, totals.double()).clamp_min(1e-30)[..., None]
    return _head_values_quant(joined[:, : w_v.shape[0]].to(w_v.dtype), w_v)


ORACLES = {
    "head_values": _head_values,
    "head_values_quant": _head_values_quant,
    "part_values_quant": _part_values_quant,
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_float64(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_float64(implementation: str) -> None:
    for case in CASES:
        check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function], "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """Those of float32 that need no rounding once more, where Triton interprets its kernels: that is chosen at import.
    It multiplies no bfloat16, and rounds to FP8 otherwise than a GPU."""
    run_in_interpreter(__file__, "triton and exact and float32 or tile")


def test_any_tile_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads otherwise have many small ones."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    from baleen.kernels.head_values import triton_kernel

    assert tuple(triton_kernel._TILES) == (16, 32, 64, 128)
    assert [triton_kernel._tile(tokens, 128) for tokens in (1, 16, 17, 33, 100, 128)] == [
        16,
        16,
        32,
        64,
        128,
        128,
    ]
    assert [triton_kernel._tile(tokens, 16) for tokens in (1, 128)] == [16, 16]
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(triton_kernel, "_PROGRAMS", 0)
    for case in CASES:
        if torch.float32 in case.parameters and exact in case.parameters:
            check(IMPLEMENTATIONS, "triton", case, ORACLES[case.function])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("implementation", [name for name in available(IMPLEMENTATIONS) if name != "gluon"])
def test_a_bad_value_spoils_its_own_blocks_only(implementation: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    attended, weight = torch.randn(3, 2, 512, device=device).bfloat16(), torch.randn(2, 128, 512, device=device)
    function = find(IMPLEMENTATIONS, implementation, "head_values_quant")
    assert function is not None
    good = dequantize_1x128(*function(attended, weight.bfloat16()))
    attended[1, 1, 300] = float("nan")
    got = dequantize_1x128(*function(attended, weight.bfloat16()))
    assert bool(got[1, 128:].isnan().all())
    got[1, 128:] = good[1, 128:]
    assert torch.equal(got, good)
