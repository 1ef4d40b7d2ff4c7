"""The Gluon kernel in an emulation of Gluon, against the reference: what it computes, and its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.kernels.dense_mla import reference
from baleen.kernels.dense_mla.cases import masked
from baleen.kernels.gluon_emulation import emulated
from baleen.kernels.testing import assert_close


def _select(asm: str, constraints: str, arguments: list[Tensor], **options: Any) -> Tensor:
    assert "and.b32 bit, $2, $3" in asm
    assert "selp.f32 $0, $1, 0fFF800000, chosen" in asm
    scores, shifted, tested = arguments
    return scores.masked_fill(shifted & tested == 0, -torch.inf)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    folder = "baleen.kernels.dense_mla"
    with monkeypatch.context() as patch:
        module = emulated(patch, f"{folder}.triton_kernel", f"{folder}.gluon_kernel", inline_asm=_select)
        patch.setattr(module, "_fits", lambda *arguments: True)
        yield module


@pytest.mark.parametrize("take_turns", [False, True])
@pytest.mark.parametrize(("programs", "persistent"), [(1, True), (4, True), (1, False)])
@pytest.mark.parametrize(
    ("queries", "start", "heads", "k", "kind"),
    [
        (300, 0, 2, 100, "future"),
        (300, 0, 2, 100, "dense rows"),
        (130, 200, 3, 290, "dense rows"),
        (130, 200, 2, 400, "dense rows"),
        (140, 385, 1, 9, "future"),
        (1, 0, 1, 1, "mask"),
        (129, 254, 2, 50, "no mask"),
        (256, 256, 1, 0, "heads first"),
    ],
)
def test_against_the_reference(
    kernel: Any, queries: int, start: int, heads: int, k: int, kind: str, programs: int, persistent: bool,
    take_turns: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = masked(queries, start, heads, (128, 64, 128), k, kind, torch.Generator().manual_seed(queries))
    monkeypatch.setattr(kernel, "_num_sms", lambda device: programs)
    monkeypatch.setattr(kernel, "OPTIONS", {"TAKE_TURNS": take_turns, "persistent": persistent})
    assert_close(kernel.masked_mha(*arguments), reference.masked_mha(*arguments), rtol=2**-7, atol=4e-3)
