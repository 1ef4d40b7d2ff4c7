"""The kernel over FP8 rows on a CPU, in an emulation of Gluon, against the reference; and compiled for Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.kernels.gluon_emulation import Registers, emulated
from baleen.kernels.sparse_mla import reference
from baleen.kernels.sparse_mla.cases import fp8_attention
from baleen.kernels.sparse_mla.test_gluon_kernel import run_assembly
from baleen.kernels.testing import assert_close

NAN = float("nan")


def _assembly(text: str, arguments: list[Tensor]) -> Any:
    if text.startswith("cvt.rn.bf16x2.f32"):
        bits = arguments[0].bfloat16().view(torch.int16).long() & 0xFFFF
        return (bits | bits << 16).to(torch.int32).as_subclass(Registers)
    return tuple(x.as_subclass(Registers) for x in run_assembly(text, *arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with monkeypatch.context() as patch:
        compute = lambda asm, constraints, arguments, **options: _assembly(asm, arguments)  # noqa: E731
        yield emulated(patch, "baleen.kernels.sparse_mla.gluon_fp8", inline_asm=compute)


def _attend(kernel: Any, arguments: tuple[Any, ...], parts: int, per_part: int, split: bool) -> list[Tensor]:
    q, values, scales, rope, indices, scale = arguments
    tokens, heads, _ = q.shape
    out = torch.full((tokens, heads, 512), NAN, dtype=torch.bfloat16)
    sums, maxima, totals = (torch.full((tokens, parts, heads, *end), NAN) for end in ((512,), (), ()))
    kernel.attend[(tokens * -(-heads // 64), parts)](
        q, values.view(torch.int32), scales, rope, indices, out, sums, maxima, totals, indices.shape[1], heads,
        per_part, scale * reference.LOG2_E, q.stride(0), q.stride(1), out.stride(0), out.stride(1), indices.stride(0),
        ROW=values.stride(0), SPLIT=split, PDL=True, num_warps=4,
    )  # fmt: skip
    return [sums, maxima, totals] if split else [out]


@pytest.mark.parametrize("padding", ["none", "anywhere", "end", "all"])
@pytest.mark.parametrize(("heads", "selected"), [(64, 640), (3, 320), (130, 64), (8, 2)])
def test_against_the_reference(kernel: Any, heads: int, selected: int, padding: str) -> None:
    arguments = fp8_attention(2, heads, selected, 512, 64, padding, torch.bfloat16, torch.Generator().manual_seed(0))
    (out,) = _attend(kernel, arguments, 1, selected, False)
    assert_close(out, reference.sparse_mla_fp8(*arguments), 2**-7, 0.1)
