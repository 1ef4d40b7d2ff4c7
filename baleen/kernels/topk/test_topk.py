"""topk against a sort of (score, position) pairs in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.testing import Case, check, largest_scratch
from baleen.kernels.topk import IMPLEMENTATIONS, reference, topk
from baleen.kernels.topk.cases import CASES, LONG_CASES


def _sorted(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    out = []
    for row, length in zip(logits.tolist(), lengths.tolist(), strict=True):
        pairs = [(math.inf if math.isnan(x) else -x, position) for position, x in enumerate(row[:length])]
        best = sorted(position for _, position in sorted(pairs)[:k])
        out.append(best + [-1] * (k - len(best)))
    return torch.tensor(out, dtype=torch.int64)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_sorted_pairs(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _sorted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*CASES, *LONG_CASES], ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_the_reference(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_gives_what_its_inputs_now_say() -> None:
    logits, lengths = torch.randn(3, 40_000, device="cuda"), torch.tensor([40_000, 9_000, 100], device="cuda")
    topk(logits, lengths, 2048)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = topk(logits, lengths, 2048)
    for seed in range(3):
        logits.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        lengths.copy_(torch.tensor([39_000 - seed, 8_000 + 500 * seed, 3_000]))
        graph.replay()
        assert torch.equal(out.cpu(), reference.topk(logits.cpu(), lengths.cpu(), 2048))


def test_by_hand() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([
        [3.0, 1.0, 2.0, 2.0, 2.0, inf],
        [0.0, -0.0, -1.0, 0.0, nan, nan],
        [5.0, 4.0, nan, inf, inf, nan],
        [nan, inf, inf, nan, inf, inf],
    ])  # fmt: skip
    positions = topk(logits, torch.tensor([5, 4, 2, 0]), 3)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[0, 2, 3], [0, 1, 3], [0, 1, -1], [-1, -1, -1]]


def test_a_tie_in_one_row_does_not_hide_a_shortage_in_another() -> None:
    """One row's tied surplus and another's NaN shortage add up to k of each; the rows must not be cut at k blindly."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [math.nan, 2.0, 0.0, 1.0]])
    assert topk(logits, torch.tensor([4, 4]), 2).tolist() == [[0, 1], [1, 3]]


def test_no_rows_and_no_columns() -> None:
    assert topk(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 4).shape == (0, 4)
    assert topk(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), 2).tolist() == [[-1, -1], [-1, -1]]


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        topk(torch.zeros(1, 4), torch.tensor([4]), 0)


@pytest.mark.parametrize("case", CASES[5::6], ids=str)
def test_small_chunks_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, lengths, k = case.arguments()
    whole = topk(logits, lengths, k)
    for budget in (1, 3 * 700 * 4):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
        assert torch.equal(topk(logits, lengths, k), whole)


def test_scratch_stays_small() -> None:
    """The logits are 16 MiB; a chunk's copy is 4 MiB."""
    logits, lengths = torch.randn(1024, 4096), torch.full((1024,), 4096)
    assert largest_scratch(topk, logits, lengths, 256) <= 4 << 20
