"""The Gluon kernel against a loop over experts and rows: in an emulation of Gluon, and compiled for Hopper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.kernels.gluon_emulation import emulated
from baleen.kernels.testing import assert_close

ROOM = 128
UNTOUCHED = -(2.0**20)
BRANCHES = (0, 1, 16, 17, 32, 33, 64, 65, 128)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = ("pdl", "pdl_gluon", "fp8_experts.layout", "fp8_experts.gluon_kernel")
    with monkeypatch.context() as patch:
        yield emulated(patch, *(f"baleen.kernels.{name}" for name in names))


def _inputs(counts: tuple[int, ...], num_rows: int, dim: int) -> tuple[Tensor, ...]:
    """What multiply takes before out; NaN in every row, and the scales of every row, that no expert has."""
    g = torch.Generator().manual_seed(sum(counts) + num_rows + dim)
    num_experts, blocks = len(counts), dim // 128
    values = torch.randn(num_experts, ROOM, dim, generator=g)
    scale = torch.rand(num_experts, blocks, ROOM, generator=g) + 0.5
    for expert, count in enumerate(counts):
        values[expert, count:] = torch.nan
        scale[expert, :, count:] = torch.nan
    weight = torch.randn(num_experts, num_rows, dim, generator=g).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(num_experts, num_rows // 128, blocks, generator=g) + 0.5
    rows = torch.tensor(counts, dtype=torch.int32)
    return values.flatten(0, 1).to(torch.float8_e4m3fn), scale, rows, weight, weight_scale


def _row_by_row(values: Tensor, scale: Tensor, counts: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """In float64; UNTOUCHED where no expert has a row."""
    num_experts, num_rows, _ = weight.shape
    out = torch.full((num_experts * ROOM, num_rows), UNTOUCHED, dtype=torch.float64)
    for expert in range(num_experts):
        factors = weight_scale[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        dequantized = weight[expert].double() * factors
        for token in range(int(counts[expert])):
            row = expert * ROOM + token
            out[row] = dequantized @ (values[row].double() * scale[expert, :, token].double().repeat_interleave(128))
    return out


def _check(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Tensor, ...], programs: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(kernel, "_num_sms", lambda device: programs)
    expected = _row_by_row(*arguments)
    out = torch.where(expected == UNTOUCHED, UNTOUCHED, torch.nan).to(dtype)
    kernel.multiply(*arguments, out)
    assert_close(out, expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("counts", "num_rows", "dim", "programs"),
    [
        (BRANCHES, 128, 256, 1),  # K of fewer blocks than stages
        (BRANCHES[::-1], 128, 128, 4),  # of one; first tiles with and without rows
        (BRANCHES, 256, 1024, 5),  # of more than stages
        ((3, 0, 0, 40, 0), 256, 384, 3),  # programs that begin with an expert without rows
        ((0, 0, 0), 384, 256, 4),
        ((128, 17), 512, 768, 100),  # a program for each tile, more than experts; K of as many blocks as stages
        ((5, 0, 128, 1), 384, 896, 2),  # fewer programs than experts, K of one block more than stages
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_loop(
    kernel: Any, counts: tuple[int, ...], num_rows: int, dim: int, programs: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _check(kernel, monkeypatch, _inputs(counts, num_rows, dim), programs, dtype)


@pytest.mark.parametrize("count", range(1, 129, 9))
def test_every_number_of_boxes(kernel: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(kernel, monkeypatch, _inputs((count, 0, 129 - count), 128, 256), 1, torch.float32)


def test_with_programmatic_dependent_launch(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose waits are ignored here: what comes before and after them is computed all the same."""
    monkeypatch.setattr(kernel.pdl, "launch", lambda tensor: {"PDL": True, "launch_pdl": True})
    _check(kernel, monkeypatch, _inputs(BRANCHES, 128, 896), 2, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_for_hopper(dtype: str) -> None:
    """Without a GPU: every product on the tensor cores, results stored 16 bytes at a time, in the memory there is.

    Four products of 32 of K each: of up to 32 tokens, of up to 64, and two of more, in two groups.
    """
    triton = pytest.importorskip("triton", reason="needs the package triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("compiles, which Triton's interpreter does not")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from baleen.kernels.fp8_experts import gluon_kernel

    blocks = {
        "x": ("fp8e4nv", [16, 128], gluon_kernel._BYTES),
        "x_scale": ("fp32", [1, 128], gluon_kernel._SCALES),
        "weight": ("fp8e4nv", [64, 128], gluon_kernel._BYTES),
    }
    pointers = {"weight_scale": "*fp32", "counts": "*i32", "out": f"*{dtype}"}
    constants = {"SHAPE": (33, 4096, 7168), "PDL": True}
    signature = {name: f"tensordesc<{type}{shape},{layout!r}>" for name, (type, shape, layout) in blocks.items()}
    signature |= pointers | dict.fromkeys(constants, "constexpr")
    names = gluon_kernel._stream.arg_names
    assert list(signature) == names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    compiled = triton.compile(
        GluonASTSource(gluon_kernel._stream, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "launch_pdl": True},
    )
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    assert ptx.count("wgmma.mma_async") == 2 * 4 * (1 + 1 + 2)
    assert set(re.findall(r"st\.global[\w.]*", ptx)) == {"st.global.v4.b32"}
    assert ptx.count("griddepcontrol.wait") == 4, "each partition"
    assert ptx.count("griddepcontrol.launch_dependents") == 1
