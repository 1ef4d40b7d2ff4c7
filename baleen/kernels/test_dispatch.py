"""The choice of implementations, on throwaway modules, and the folder's rules."""

from __future__ import annotations

import ast
import pkgutil
import sys
import timeit
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import baleen.kernels
from baleen.kernels import dispatch

OPS = [module.name for module in pkgutil.iter_modules(baleen.kernels.__path__) if module.ispkg]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    """An engine that an earlier test built may have chosen "reference" for the process."""
    dispatch.use("auto")
    yield
    dispatch.use("auto")


@pytest.fixture
def implementations(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    fast, slow = types.ModuleType("fake_fast"), types.ModuleType("fake_slow")
    fast.double = lambda x: ("fast", "double")  # type: ignore[attr-defined]
    slow.double = lambda x: ("slow", "double")  # type: ignore[attr-defined]
    slow.triple = lambda x: ("slow", "triple")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_fast", fast)
    monkeypatch.setitem(sys.modules, "fake_slow", slow)
    return {"fast": "fake_fast:double", "reference": "fake_slow:double"}


HERE, ELSEWHERE = torch.ones(1), torch.ones(1, device="meta")  # a CPU's tensor, and one of a device that is no CPU


def test_auto_takes_the_first_and_reference_the_definition(implementations: dict[str, str]) -> None:
    op = dispatch.Op(implementations)
    assert op(ELSEWHERE) == ("fast", "double")
    dispatch.use("reference")
    assert op(ELSEWHERE) == ("slow", "double")
    dispatch.use("auto")
    assert op(ELSEWHERE) == ("fast", "double")


def test_a_cpu_runs_the_reference_beside_a_gpu(implementations: dict[str, str]) -> None:
    op = dispatch.Op(implementations)
    assert (op(HERE), op(ELSEWHERE), op(HERE)) == (("slow", "double"), ("fast", "double"), ("slow", "double"))


def test_an_op_can_be_pinned(implementations: dict[str, str]) -> None:
    """By its folder's name."""
    op = dispatch.Op(implementations)
    dispatch.use("auto", {"fake_slow": "reference"})
    assert op(ELSEWHERE) == ("slow", "double")
    dispatch.use("auto", {"topk": "reference"})
    assert op(ELSEWHERE) == ("fast", "double")


def test_a_function_the_first_lacks_comes_from_the_reference(implementations: dict[str, str]) -> None:
    assert dispatch.Op(implementations, "triple")(ELSEWHERE) == ("slow", "triple")


def test_an_implementation_whose_library_is_missing_is_passed_over(implementations: dict[str, str]) -> None:
    listed = {"vendor": "no_such_library_here:double", **implementations}
    assert dispatch.available(listed) == ["fast", "reference"]
    assert dispatch.Op(listed)(ELSEWHERE) == ("fast", "double")


def test_a_missing_module_of_baleen_is_an_error_and_not_passed_over(implementations: dict[str, str]) -> None:
    with pytest.raises(ModuleNotFoundError):
        dispatch.available({"gone": "baleen.kernels.gone:double", **implementations})


def test_nothing_is_loaded_before_the_first_call() -> None:
    op = dispatch.Op({"reference": "no_such_library_here:double"})
    with pytest.raises(ModuleNotFoundError):
        op(HERE)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda"):
        dispatch.use("cuda")


def test_a_call_costs_about_a_microsecond(implementations: dict[str, str]) -> None:
    op = dispatch.Op(implementations)
    bare = sys.modules["fake_slow"].double
    number = 20_000
    through = min(timeit.repeat(lambda: op(HERE), number=number, repeat=5))
    direct = min(timeit.repeat(lambda: bare(HERE), number=number, repeat=5))
    # 0.3 us measured; the bound leaves room for a busy machine and still catches a lookup per call.
    assert (through - direct) / number < 2e-6


@pytest.mark.parametrize("name", OPS)
def test_every_op_folder_is_complete(name: str) -> None:
    package = import_module(f"baleen.kernels.{name}")
    assert "reference" in package.IMPLEMENTATIONS
    main = package.IMPLEMENTATIONS["reference"].split(":")[1]
    assert callable(getattr(package, main))
    assert import_module(f"baleen.kernels.{name}.cases").CASES
    folder = Path(str(package.__file__)).parent
    assert (folder / f"test_{name}.py").exists()
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            documentation = ast.get_docstring(node) or ""
            assert "Error:" in documentation, f"{name}.{node.name} does not state its error"
