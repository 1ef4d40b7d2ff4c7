"""The kernel of FP8 rows in three groups of warps, in an emulation of Gluon, by itself; test_gluon_kernel.py has it as
hopper.py launches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.kernels.gluon_emulation import emulated
from baleen.kernels.sparse_mla import reference
from baleen.kernels.sparse_mla.cases import fp8_attention
from baleen.kernels.sparse_mla.test_gluon_kernel import emulated_assembly
from baleen.kernels.testing import assert_close

NAMES = ("baleen.kernels.pdl_gluon", "baleen.kernels.sparse_mla.gluon_rows", "baleen.kernels.sparse_mla.gluon_fp8")
SOURCE = Path(__file__).with_name("gluon_fp8.py").read_text()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with monkeypatch.context() as patch:
        yield emulated(patch, *NAMES, inline_asm=emulated_assembly)


def _attend(kernel: Any, arguments: tuple[Any, ...], parts: int, per_part: int, split: bool) -> list[Tensor]:
    q, values, scales, rope, indices, scale = arguments
    tokens, heads, _ = q.shape
    out = torch.full((tokens, heads, 512), torch.nan, dtype=torch.bfloat16)
    sums, maxima, totals = (torch.full((tokens, parts, heads, *end), torch.nan) for end in ((512,), (), ()))
    kernel.attend[(tokens * -(-heads // 64), parts)](
        q, values.view(torch.int32), scales, rope, indices, out, sums, maxima, totals, indices.shape[1], heads,
        per_part, scale * reference.LOG2_E, q.stride(0), q.stride(1), out.stride(0), out.stride(1), indices.stride(0),
        ROW=values.stride(0), SPLIT=split, PDL=True, num_warps=4,
    )  # fmt: skip
    return [sums, maxima, totals] if split else [out]


def _case(heads: int, selected: int, padding: str) -> tuple[Any, ...]:
    return fp8_attention(2, heads, selected, 512, 64, padding, torch.bfloat16, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", ["none", "anywhere", "end", "all"])
@pytest.mark.parametrize(("heads", "selected"), [(64, 640), (3, 320), (130, 129), (8, 2)])
def test_against_the_reference(kernel: Any, heads: int, selected: int, padding: str) -> None:
    arguments = _case(heads, selected, padding)
    (out,) = _attend(kernel, arguments, 1, selected, False)
    assert_close(out, reference.sparse_mla_fp8(*arguments), 2**-7, 0.1)


def test_parts_are_those_of_the_reference(kernel: Any) -> None:
    arguments = _case(70, 512, "end")
    sums, maxima, totals = _attend(kernel, arguments, 2, 256, True)
    for part in range(2):
        own = (*arguments[:4], arguments[4][:, part * 256 : (part + 1) * 256], arguments[5])
        assert_close(
            sums[:, part] / totals[:, part, :, None].clamp(min=1e-30), reference.sparse_mla_fp8(*own), 2**-7, 0.1
        )
    assert bool((maxima[0] == -1e30).all()), "a token without a row"
    assert not bool(totals[0].any())


@pytest.mark.parametrize(
    ("correct", "wrong"),
    [
        # overwritten while it is read
        ("(tile >> 1) & 1 ^ 1)", "(tile >> 1) & 1)"),
        ("        mbarrier.wait(read.index(buffer), (tile >> 1) & 1 ^ 1)\n", ""),
        # read before it is there
        ("    _wait_for_tile(written.index(0), 0)\n", ""),
        ("    _wait_for_tile(written.index(1), phase)\n", ""),
        ("        mbarrier.wait(weighted.index(buffer), (tile >> 1) & 1)\n", ""),
        ("        async_copy.wait_group(0)\n        gl.thread_barrier()", "        gl.thread_barrier()"),
        # another's sum
        ("acc = warpgroup_mma_wait(PRODUCTS, deps=(acc,))", "acc = warpgroup_mma_wait(PRODUCTS + 1, deps=(acc,))"),
        ("latents.index(buffer * 2 + 1)", "latents.index(buffer * 2)"),
        ("        index = following\n        _write(words_0", "        _write(words_0"),
    ],
)
def test_the_emulation_notices(kernel: Any, monkeypatch: pytest.MonkeyPatch, correct: str, wrong: str) -> None:
    assert correct in SOURCE
    monkeypatch.setattr("baleen.kernels.gluon_emulation.DEADLOCK_SECONDS", 1.0)
    arguments = _case(64, 640, "none")
    want = reference.sparse_mla_fp8(*arguments)

    def run(source: str) -> None:
        exec(compile(source, NAMES[-1], "exec"), vars(kernel))
        assert_close(_attend(kernel, arguments, 1, 640, False)[0], want, 2**-7, 0.1)

    run(SOURCE)
    with pytest.raises((AssertionError, TimeoutError, RuntimeError)):
        run(SOURCE.replace(correct, wrong))
