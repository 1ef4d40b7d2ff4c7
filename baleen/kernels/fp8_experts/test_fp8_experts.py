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

from baleen.kernels.dispatch import available, find
from baleen.kernels.fp8_experts import IMPLEMENTATIONS, fp8_experts
from baleen.kernels.fp8_experts.cases import CASES
from baleen.kernels.fp8_quant import Quantized, dequantize_1x128, quantize_1x128
from baleen.kernels.testing import Case, assert_close, check, run_in_interpreter, to_device

BLOCK = 128


def _dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)


def _token_by_token(
    x: Quantized,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.zeros(x.values.shape, dtype=torch.float64)
    for t, row in enumerate(dequantize_1x128(*x).double()):
        for expert, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            gate, up = (_dequantized(gate_up[expert], gate_up_scale[expert]) @ row).to(dtype).double().chunk(2)
            hidden = (F.silu(gate) * up).to(dtype)
            hidden = dequantize_1x128(*quantize_1x128(hidden)).double()
            out[t] += weight * (_dequantized(down[expert], down_scale[expert]) @ hidden)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_a_loop(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _token_by_token)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 65, 128, 129, 700])
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_the_reference(implementation: str, tokens: int) -> None:
    """Memory full of NaN; FP8 steps of the activations between the products make the difference."""
    (case,) = [case for case in CASES if case.parameters == (20, 3, 6, 384, 256, torch.bfloat16)]
    arguments = to_device(case.make(tokens, 4, 33, 1024, 512, torch.bfloat16, torch.Generator().manual_seed(5)), "cuda")
    expected = find(IMPLEMENTATIONS, "reference", "fp8_experts")(*arguments).double()  # type: ignore[misc]
    got = find(IMPLEMENTATIONS, implementation, "fp8_experts")(*arguments).double()  # type: ignore[misc]
    assert float((got - expected).norm() / expected.norm()) < 0.01
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The tests of every implementation once more, where Triton interprets its kernels: that is chosen at import."""
    run_in_interpreter(__file__, "triton and (loop and bfloat16 or strided) or hold or few_rows or stream")


class FakeDeepGemm(ModuleType):
    """What DeepGEMM documents of its grouped product, on a CPU; rows of no expert come out as NaN."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.calls: list[str] = []

    @staticmethod
    def get_mk_alignment_for_contiguous_layout() -> int:
        return BLOCK

    @staticmethod
    def set_pdl(enabled: bool) -> None:
        """Of the launch alone."""

    def m_grouped_fp8_gemm_nt_contiguous(
        self, a: Any, b: Any, out: Tensor, ends: Tensor, use_psum_layout: bool = False
    ) -> None:
        self.calls.append("joined")
        assert use_psum_layout
        assert out.shape[0] == a[0].shape[0] == a[1].shape[0]
        assert a[1].stride() == (1, a[0].shape[0]), "taken without a copy"
        assert a[0].shape[0] % 4 == 0
        self._check(b, ends)
        out.fill_(torch.nan)
        end = 0
        for expert, next_end in enumerate(ends.tolist()):
            start = -(-end // BLOCK) * BLOCK
            assert next_end >= start, "an expert without rows ends where it begins"
            end = next_end
            assert -(-end // BLOCK) * BLOCK <= out.shape[0], "a block past the end"
            self._multiply(a, b, out, slice(start, end), expert)

    @staticmethod
    def _check(b: Any, ends: Tensor) -> None:
        assert ends.dtype == torch.int32
        assert ends.shape == (b[0].shape[0],)

    @staticmethod
    def _multiply(a: Any, b: Any, out: Tensor, rows: Any, expert: int) -> None:
        x = dequantize_1x128(a[0][rows].contiguous(), a[1][rows])
        out[rows] = (x.double() @ _dequantized(b[0][expert], b[1][expert]).t()).to(out.dtype)


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The implementation around a stand-in for the products."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    name = "baleen.kernels.fp8_experts.deep_gemm"
    real = sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, "deep_gemm", FakeDeepGemm())
    module = import_module(name)
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    yield module
    del sys.modules[name]
    if real is not None:
        sys.modules[name] = real


@pytest.mark.parametrize("case", [case for case in CASES if torch.bfloat16 in case.parameters], ids=str)
def test_rows_go_to_their_experts_and_back(deep_gemm: Any, case: Case) -> None:
    arguments = case.arguments()
    got = deep_gemm.fp8_experts(*arguments)
    assert deep_gemm.deep_gemm.calls == 2 * ["joined"]
    assert_close(got, _token_by_token(*arguments), case.rtol, case.atol)


@pytest.mark.parametrize("words", [16, 2048])
@pytest.mark.parametrize(("tokens", "joined"), [(20, False), (100, False), (100, True)])
def test_layouts_hold_each_row_once(
    deep_gemm: Any, tokens: int, joined: bool, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert has all tokens, most have none; scales are column-major in x too. words: copied at a time."""
    experts, hidden = 40, 256
    g = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randperm(12, generator=g)[:5] * 3 for _ in range(tokens)])
    ids[:, 4] = experts - 1
    x = quantize_1x128(torch.randn(tokens, hidden, generator=g))
    x = x._replace(scale=x.scale.t().contiguous().t())
    layout = deep_gemm.layout
    monkeypatch.setattr(layout, "_WORDS", words)
    place = layout.joined(x, ids, experts, 64) if joined else layout.masked(x, ids, experts)
    rows, counts = place.rows.long(), ids.flatten().bincount(minlength=experts)
    assert rows.unique().numel() == ids.numel()
    assert torch.equal(place.values[rows].float(), x.values.float().repeat_interleave(5, 0))
    by_row = place.scale.transpose(1, 2).reshape(-1, hidden // 128)
    assert torch.equal(by_row[rows], x.scale.repeat_interleave(5, 0))
    if joined:
        starts = (place.ends - counts).int()
        assert bool((starts % 64 == 0).all())
        assert torch.equal(starts[1:], -(-place.ends[:-1] // 64) * 64)
    else:
        assert torch.equal(place.ends.long(), counts)
        starts = torch.arange(experts) * layout.MASKED_TOKENS
    first = starts[ids.flatten()]
    assert bool(((rows >= first) & (rows < first + counts[ids.flatten()])).all())


@pytest.mark.parametrize("tokens", [17, 33, 128])
def test_columns_hold_each_pair_once(deep_gemm: Any, tokens: int) -> None:
    """Experts of 0, 16, 17 and more pairs; the columns of one come one after the other."""
    experts, g = 21, torch.Generator().manual_seed(tokens)
    ids = torch.stack([2 * torch.randperm(9, generator=g)[:4] for _ in range(tokens)])
    ids[:, 0], ids[:16, 1], ids[16:, 1], ids[:17, 2] = experts - 1, 17, 18, 19
    plan = deep_gemm.triton_kernel.columns_of(ids, experts)
    assert plan.shape == (experts + ids.numel() // 16, 18)
    by_expert: list[list[int]] = [[] for _ in range(experts)]
    working = 0
    for *pairs, count, expert in plan.tolist():
        by_expert[expert] += pairs[:count]
        working += count > 0
    for expert, pairs in enumerate(by_expert):
        assert pairs == (ids.flatten() == expert).nonzero()[:, 0].tolist()
    assert working == sum(-(-len(pairs) // 16) for pairs in by_expert)


def test_few_rows_of_an_expert_go_to_our_kernel(deep_gemm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = [case for case in CASES if case.parameters == (33, 2, 24, 128, 128, torch.bfloat16)]
    monkeypatch.setattr(deep_gemm, "FEW_ROWS", 8)
    arguments = case.arguments()
    got = deep_gemm.fp8_experts(*arguments)
    assert deep_gemm.deep_gemm.calls == []
    assert_close(got, _token_by_token(*arguments), case.rtol, case.atol)


@pytest.mark.parametrize(("shape", "product"), [((128, 3, 8, 128, 128), "streamed"), ((150, 2, 7, 128, 128), "joined")])
def test_up_to_128_tokens_stream_the_weights(
    deep_gemm: Any, shape: tuple[int, ...], product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where our kernel can run; more go to DeepGEMM."""
    fake = deep_gemm.deep_gemm

    def multiply(
        values: Tensor, scale: Tensor, counts: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor
    ) -> None:
        """As its docstring says; rows of no expert come out as NaN."""
        fake.calls.append("streamed")
        num_experts, num_rows, dim = weight.shape
        assert values.shape == (num_experts * 128, dim)
        assert scale.shape == (num_experts, dim // 128, 128)
        assert out.shape == (num_experts * 128, num_rows)
        assert values.is_contiguous()
        assert scale.is_contiguous()
        assert out.is_contiguous()
        fake._check((weight, weight_scale), counts)
        out.fill_(torch.nan)
        rows_scale = scale.transpose(1, 2).flatten(0, 1)
        for expert, count in enumerate(counts.tolist()):
            rows = slice(expert * 128, expert * 128 + count)
            fake._multiply((values, rows_scale), (weight, weight_scale), out, rows, expert)

    monkeypatch.setattr(deep_gemm.gluon_kernel, "can_run", lambda weight: True)
    monkeypatch.setattr(deep_gemm.gluon_kernel, "multiply", multiply)
    (case,) = [case for case in CASES if case.parameters == (*shape, torch.bfloat16)]
    arguments = case.arguments()
    got = deep_gemm.fp8_experts(*arguments)
    assert fake.calls == 2 * [product]
    assert_close(got, _token_by_token(*arguments), case.rtol, case.atol)


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_strided_scales_and_columns_of_a_wider_routing(implementation: str) -> None:
    function = find(IMPLEMENTATIONS, implementation, "fp8_experts")
    assert function is not None
    x, ids, weights, *rest = CASES[2].arguments()
    expected = function(x, ids, weights, *rest)
    turned = x._replace(scale=x.scale.t().contiguous().t())
    wide_ids, wide_weights = torch.cat((ids, ids), 1), torch.cat((weights, weights), 1)
    got = function(turned, wide_ids[:, : ids.shape[1]], wide_weights[:, : ids.shape[1]], *rest)
    assert torch.equal(got, expected)


def test_no_token() -> None:
    x, ids, weights, *rest = CASES[0].arguments()
    empty = Quantized(x.values[:0], x.scale[:0])
    assert fp8_experts(empty, ids[:0], weights[:0], *rest).shape == (0, 128)
