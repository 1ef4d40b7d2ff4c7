"""Which implementation runs, what each hands to its library, and the table of choices."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.kernels.fp8_gemm import reference, scaled_mm, tune, tuned
from baleen.kernels.fp8_gemm.cases import CASES
from baleen.kernels.fp8_gemm.tuned import Choice
from baleen.kernels.fp8_quant import Quantized
from baleen.kernels.testing import Case, assert_close


class FakeDeepGemm(ModuleType):
    """What DeepGEMM documents of its product, on a CPU; scales that it would have to transpose are an error."""

    def set_pdl(self, enabled: bool) -> None:
        """Of the launch alone."""

    def fp8_gemm_nt(self, a: Any, b: Any, out: Tensor) -> None:
        values, scale = a
        assert scale.stride() == (1, -(-values.shape[0] // 4) * 4)
        assert out.dtype == torch.bfloat16
        out.copy_(reference.fp8_gemm(Quantized(values, scale), *b, torch.float32))


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    name = "baleen.kernels.fp8_gemm.deep_gemm"
    real = sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, "deep_gemm", FakeDeepGemm("deep_gemm"))
    module = import_module(name)
    monkeypatch.setattr(module, "_on_gpu", lambda values: True)
    yield module
    del sys.modules[name]
    if real is not None:
        sys.modules[name] = real


def _check(run: tuned.Run, case: Case) -> None:
    expected = reference.fp8_gemm(*case.arguments())
    got = run(*case.arguments())
    assert got.dtype == expected.dtype
    assert_close(got, expected, case.rtol, case.atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deep_gemm_gets_the_rows_as_they_lie(deep_gemm: Any, case: Case) -> None:
    _check(deep_gemm.fp8_gemm, case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("row_major", [False, True])
def test_scaled_mm_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch, case: Case, row_major: bool) -> None:
    calls = []

    def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        calls.append(a.shape)
        assert scale_a.stride() == (1, a.shape[0])
        assert a.shape[0] % 4 == 0
        assert scale_b.stride() == (1, a.shape[1] // 128)
        assert scale_b.stride(1) % 4 == 0
        return reference.fp8_gemm(Quantized(a, scale_a), b.t(), scale_b.t(), out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(scaled_mm, "_on_gpu", lambda values: True)
    (values, scale), *rest = case.arguments()
    expected = reference.fp8_gemm(Quantized(values, scale), *rest)
    got = scaled_mm.fp8_gemm(Quantized(values, scale.contiguous() if row_major else scale), *rest)
    assert_close(got, expected, case.rtol, case.atol)
    assert len(calls) == scaled_mm.takes(*case.parameters[:3])


class _Implementation:
    """Says who was called, and with what configuration."""

    def __init__(self, name: str, most: int = 1 << 30) -> None:
        self.name, self.most = name, most

    class Config(tuple):
        def __new__(cls, *fields: int) -> _Implementation.Config:
            return super().__new__(cls, fields)

    def takes(self, num_tokens: int, num_rows: int, num_cols: int) -> bool:
        return num_tokens <= self.most

    def fp8_gemm(self, x: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype, config: Any = None) -> Any:
        return self.name, config


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Implementations that do nothing, on a GPU that is none."""
    modules = {"triton": _Implementation("triton", 128), "deep_gemm": _Implementation("deep_gemm")}
    monkeypatch.setattr(tuned, "modules", lambda: modules)
    monkeypatch.setattr(tuned, "_is_hopper", lambda device: True)
    monkeypatch.setattr(tuned, "_runs", {})
    monkeypatch.setattr(tuned, "_table", {(256, 128): {4: Choice("triton", (16, 64, 3)), 64: Choice("deep_gemm")}})
    return modules


def _chosen(num_tokens: int, num_rows: int = 256, num_cols: int = 128) -> Any:
    x = Quantized(torch.empty(num_tokens, num_cols), torch.empty(num_tokens, 1))
    return tuned.fp8_gemm(x, torch.empty(num_rows, num_cols), torch.empty(2, 1), torch.bfloat16)


@pytest.mark.usefixtures("names")
def test_the_choice_is_the_measured_one_or_the_next_larger() -> None:
    for num_tokens, expected in (
        *((1, ("triton", (16, 64, 3))), (3, ("triton", (16, 64, 3))), (4, ("triton", (16, 64, 3)))),
        *((5, ("deep_gemm", None)), (64, ("deep_gemm", None)), (9000, ("deep_gemm", None))),
    ):
        assert _chosen(num_tokens) == expected
    assert _chosen(3, num_rows=512) == ("triton", None), "not measured: few rows"
    assert _chosen(65, num_rows=512) == ("deep_gemm", None), "not measured: many rows"


def test_what_cannot_run_is_passed_over(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names["deep_gemm"].most = 0
    assert _chosen(64) == ("triton", None)
    names["triton"].most = 0
    tuned._runs.clear()
    monkeypatch.setattr(reference, "fp8_gemm", lambda *arguments: "reference")
    assert _chosen(64) == "reference"
    del names["deep_gemm"], names["triton"]
    tuned._runs.clear()
    assert _chosen(1) == "reference"


def test_without_a_gpu_it_is_the_reference() -> None:
    for case in CASES[:4]:
        _check(tuned.fp8_gemm, case)


def test_a_table_replaces_the_one_before(names: dict[str, Any], tmp_path: Path) -> None:
    assert _chosen(1)[0] == "triton"
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"shapes": {"256x128": {"64": {"use": "deep_gemm"}}}}))
    tuned.use_table(path)
    assert _chosen(1) == ("deep_gemm", None)
    assert _chosen(1, num_rows=512) == ("triton", None)


@pytest.mark.parametrize("text", ["{}", "[]", "nothing", '{"shapes": {"3": {}}}', '{"shapes": {"3x4": {"1": {}}}}'])
def test_a_table_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json"):
        tuned.read_table(tmp_path / "table.json")


def _fits_a_processor(config: tuple[int, ...], num_cols: int) -> None:
    block_m, block_n, splits, stages, warps, pdl = config
    assert block_m in (16, 32, 64, 128)
    assert block_n in (64, 128, 256)
    assert 1 <= splits <= num_cols // 128
    assert stages * (block_m + block_n) * 128 < 227 << 10
    assert warps in (4, 8)
    assert pdl in (0, 1)


def test_the_table_that_is_checked_in() -> None:
    table = tuned.read_table(tuned.CHECKED_IN)
    assert set(table) == set(tune.SHAPES)
    for (_, num_cols), entries in table.items():
        for num_tokens, choice in entries.items():
            assert num_tokens & (num_tokens - 1) == 0
            assert choice.use in ("triton", "deep_gemm", "scaled_mm")
            if choice.use == "triton":
                assert choice.config is not None
                assert num_tokens <= 128
                _fits_a_processor(choice.config, num_cols)


@pytest.mark.parametrize("shape", tune.SHAPES)
def test_configurations_worth_measuring(shape: tuple[int, int]) -> None:
    for num_tokens in (1, 2, 16, 32, 64, 128):
        found = tune.configs(num_tokens, *shape)
        assert 1 <= len(found) <= 20
        for config in found:
            _fits_a_processor(config, shape[1])


def test_tune_takes_the_fastest_that_is_right(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With stand-ins: one that is fast and wrong, one that fails, one that is slow."""

    class Product(_Implementation):
        def fp8_gemm(self, x: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype, config: Any = None) -> Any:
            if self.name == "failing":
                raise RuntimeError("no such product")
            return reference.fp8_gemm(x, weight, scale, dtype) * (2 if self.name == "wrong" else 1)

    names.clear()
    names.update({name: Product(name) for name in ("failing", "wrong", "right", "slower")})
    monkeypatch.setattr(tune, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "_device_name", lambda: "none")
    monkeypatch.setattr(tune, "_empty_cache", lambda: None)
    monkeypatch.setattr(tune, "_ROTATED_BYTES", 1)
    times = iter([0.2, 0.3, 0.5, 0.4])
    monkeypatch.setattr(tune, "_milliseconds", lambda product, length: next(times))
    seen: dict[int, list[str]] = {}

    def report(num_tokens: int, num_rows: int, num_cols: int, results: list[tune.Measured]) -> None:
        seen[num_tokens] = [result.failure.split(" ")[0] for result in results]

    table = tune.tune([(256, 384)], tmp_path / "table.json", (2, 128), report)
    entries = table["shapes"]["256x384"]
    assert [(count, entry["use"], entry["ms"]) for count, entry in entries.items()] == [
        ("2", "right", 0.2),
        ("128", "slower", 0.4),
    ]
    assert seen == {2: ["RuntimeError:", "wrong", "", ""], 128: ["RuntimeError:", "wrong", "", ""]}
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert tuned.read_table(tmp_path / "table.json") == {(256, 384): {2: Choice("right"), 128: Choice("slower")}}
    with pytest.raises(ValueError, match="powers of two"):
        tune.tune([(256, 384)], None, (3,))
