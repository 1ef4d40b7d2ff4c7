"""The Gluon kernel against float64: in an emulation of Gluon, and compiled for Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from baleen.kernels.gluon_emulation import emulated
from baleen.kernels.head_values.cases import CASES, exact
from baleen.kernels.head_values.test_head_values import _part_values_quant
from baleen.kernels.testing import Case, assert_few_flips


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = ("pdl", "pdl_gluon", "fp8_quant.triton_kernel", "head_values.triton_kernel", "head_values.gluon_kernel")
    with monkeypatch.context() as patch:
        yield emulated(patch, *(f"baleen.kernels.{name}" for name in names))


OWN = [case for case in CASES if case.function == "part_values_quant" and {512, torch.bfloat16} <= {*case.parameters}]


@pytest.mark.parametrize("case", OWN, ids=str)
@pytest.mark.parametrize("early", [False, True])
def test_against_float64(kernel: Any, case: Case, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "can_run", lambda sums: True)
    monkeypatch.setattr(kernel.pdl, "launch", lambda tensor: {"PDL": early, "launch_pdl": early})
    arguments = case.arguments()
    monkeypatch.setattr(kernel.triton_kernel, "part_values_quant", lambda *arguments: pytest.fail("left to another"))
    got, expected = kernel.part_values_quant(*arguments), _part_values_quant(*case.arguments())
    assert_few_flips(got.values, expected[0], case.flips, got.scale, expected[1])


def test_what_it_cannot_do_is_left_to_the_other_kernel(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "can_run", lambda sums: True)
    monkeypatch.setattr(kernel.triton_kernel, "part_values_quant", lambda *arguments: "the other's")
    others = [case for case in CASES if case.function == "part_values_quant" and case not in OWN]
    assert len(others) > 5
    for case in others:
        assert kernel.part_values_quant(*case.arguments()) == "the other's", case


def test_there_are_cases_of_every_kind() -> None:
    assert len(OWN) >= 4
    assert any(exact in case.parameters for case in OWN)


@pytest.mark.parametrize("parts", [1, 8, 32])
def test_compiles_for_hopper(parts: int) -> None:
    """Without a GPU: 16 bytes of the weight and two columns of a part at a time."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("compiles, which Triton's interpreter does not")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from baleen.kernels.head_values import gluon_kernel

    types = ("*fp32", "*fp32", "*fp32", "*bf16", "*fp8e4nv", "*fp32")
    pointers = dict(zip(("sums", "maxima", "totals", "weight", "values", "scale"), types))
    numbers = dict.fromkeys(("num_parts", "num_heads", "weight_head", "weight_row", "scale_stride"), "i32")
    constants = {"WIDTH": 128 * 128, "PARTS": parts, "PDL": True}
    names = gluon_kernel._values.arg_names
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, "weight_head", "weight_row")}
    compiled = triton.compile(
        GluonASTSource(gluon_kernel._values, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": gluon_kernel.NUM_WARPS, "launch_pdl": True, "maxnreg": 128},
    )
    ptx = compiled.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
    assert ptx.count("ld.global.v4.b32") == 8 * 4, "16 rows of 512 values a chunk, in 256 threads"
    assert ptx.count("ld.global.v2.b32") == parts
    assert compiled.metadata.shared < 4096
