"""The mark of compiled kernels: where it lies, and what makes it another."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from baleen.kernels import compile_cache


def test_settings_sources_versions_and_gpu_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "kernels"
    shutil.copytree(compile_cache.SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    first = compile_cache.fingerprint("settings")
    monkeypatch.setattr(compile_cache, "SOURCES", sources)
    assert compile_cache.fingerprint("settings") == first, "the same wherever it is installed"
    seen = {first, compile_cache.fingerprint("others")}
    for name in ("topk/topk.cu", "topk/kth.cuh", "rms_norm/triton_kernel.py", "fp8_gemm/tuned_h200.json"):
        with (sources / name).open("a") as file:
            file.write("\n")
        seen.add(compile_cache.fingerprint("settings"))
    (sources / "rope" / "__pycache__").mkdir()
    (sources / "rope" / "__pycache__" / "reference.pyc").touch()
    assert compile_cache.fingerprint("settings") in seen
    monkeypatch.setattr(compile_cache, "_gpu", lambda: "another")
    seen.add(compile_cache.fingerprint("settings"))
    monkeypatch.setattr(compile_cache, "_version", lambda package: f"another {package}")
    seen.add(compile_cache.fingerprint("settings"))
    assert len(seen) == 8


def test_it_lies_in_the_folder_of_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SimpleNamespace(dir=str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=SimpleNamespace(cache=cache)))
    assert compile_cache.mark_of("settings").parent == tmp_path
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError):
        compile_cache.mark_of("settings")
