"""baleen doctor on a machine without a GPU, and the table that it writes where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baleen import doctor
from baleen.config import ConfigError
from baleen.hardware import Hardware
from baleen.kernels.fp8_gemm import tune, tuned

CPU = Hardware("cpu", 8 << 30, 2)
H200 = Hardware("cuda", 8 << 30, 2, 141 << 30, 90, frozenset({"deep_gemm"}))


def test_a_cpu_runs_the_references(capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor.report(CPU)
    assert any(line.split() == ["fp8_gemm", "reference"] for line in lines)
    assert any(line.split() == ["topk", "reference"] for line in lines)
    assert doctor.main([]) == 0
    assert "operation" in capsys.readouterr().out


def test_a_gpu_has_its_libraries_named() -> None:
    lines = doctor.report(H200)
    assert "libraries   deep_gemm" in lines
    assert "capability  9.0" in lines


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "detect", staticmethod(lambda: CPU))
    with pytest.raises(ConfigError, match="--tune: no NVIDIA GPU"):
        doctor.main(["--tune"])


@pytest.mark.parametrize("given", [[], ["table.json"]])
def test_the_table_goes_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Hardware, "detect", staticmethod(lambda: H200))
    monkeypatch.setattr(tune, "tune", lambda **options: asked.append(options["out_path"]))
    assert doctor.main(["--tune", *given]) == 0
    assert asked == [Path(given[0]) if given else tuned.CHECKED_IN]
