"""fp8_experts against a loop over tokens and experts on dequantised weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.fp8_experts import IMPLEMENTATIONS, fp8_experts
from baleen.kernels.fp8_experts.cases import CASES
from baleen.kernels.fp8_quant import dequantize_1x128, quantize_1x128
from baleen.kernels.testing import Case, assert_close, check


def _dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)


def _token_by_token(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(dequantize_1x128(*quantize_1x128(x)).double()):
        for expert, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            gate, up = (_dequantized(gate_up[expert], gate_up_scale[expert]) @ row).to(x.dtype).double().chunk(2)
            hidden = (F.silu(gate) * up).to(x.dtype)
            hidden = dequantize_1x128(*quantize_1x128(hidden)).double()
            out[t] += weight * (_dequantized(down[expert], down_scale[expert]) @ hidden)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_a_loop(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _token_by_token)


class FakeDeepGemm(ModuleType):
    """What DeepGEMM documents of its two grouped products, on a CPU; rows of no expert come out as NaN."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.blocks: list[int] = []

    @staticmethod
    def get_mk_alignment_for_contiguous_layout() -> int:
        return 128

    def fp8_m_grouped_gemm_nt_masked(self, a: Any, b: Any, out: Tensor, counts: Tensor, expected: int) -> None:
        assert counts.dtype == torch.int32
        assert expected >= 1
        out.fill_(torch.nan)
        for expert, count in enumerate(counts.tolist()):
            self._multiply(a, b, out, (expert, slice(count)), expert)

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Any, b: Any, out: Tensor, experts: Tensor) -> None:
        assert experts.dtype == torch.int32
        assert experts.shape[0] == out.shape[0] == a[0].shape[0]
        out.fill_(torch.nan)
        for start in range(0, out.shape[0], 128):
            (expert,) = experts[start : start + 128].unique().tolist()
            if expert >= 0:
                self.blocks.append(expert)
                self._multiply(a, b, out, slice(start, start + 128), expert)

    def _multiply(self, a: Any, b: Any, out: Tensor, rows: Any, expert: int) -> None:
        x = dequantize_1x128(a[0][rows].contiguous(), a[1][rows])
        out[rows] = (x.double() @ _dequantized(b[0][expert], b[1][expert]).t()).to(out.dtype)


@pytest.fixture
def deep_gemm_layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    name = "baleen.kernels.fp8_experts.deep_gemm"
    real = sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, "deep_gemm", FakeDeepGemm())
    module = import_module(name)
    monkeypatch.setattr(module, "_on_gpu", lambda x: True)
    yield module
    del sys.modules[name]
    if real is not None:
        sys.modules[name] = real


@pytest.mark.parametrize("case", [case for case in CASES if torch.bfloat16 in case.parameters], ids=str)
@pytest.mark.parametrize("most_masked", [0, 256])
def test_rows_go_to_their_experts_and_back(deep_gemm_layouts: Any, case: Case, most_masked: int) -> None:
    """Both layouts of DeepGEMM's grouped products, with a stand-in for the products."""
    arguments = case.arguments()
    if most_masked < arguments[0].shape[0]:
        deep_gemm_layouts.MASKED_TOKENS = most_masked
    expected = _token_by_token(*arguments)
    assert_close(deep_gemm_layouts.fp8_experts(*arguments), expected, case.rtol, case.atol)
    if most_masked < arguments[0].shape[0]:
        counts = arguments[1].flatten().bincount().tolist()
        wanted = [expert for expert, count in enumerate(counts) for _ in range(-(-count // 128))]
        assert deep_gemm_layouts.deep_gemm.blocks == 2 * wanted, "blocks of no expert are not computed"


def test_no_token() -> None:
    arguments = list(CASES[0].arguments())
    arguments[:3] = [tensor[:0] for tensor in arguments[:3]]
    assert fp8_experts(*arguments).shape == (0, 128)
