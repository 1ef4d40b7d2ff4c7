"""topk, topk_slots and topk_mask against a sort of (score, position) pairs in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.testing import Case, check, largest_scratch
from baleen.kernels.topk import IMPLEMENTATIONS, reference, topk, topk_mask, topk_slots
from baleen.kernels.topk.cases import CASES, LONG_CASES


def _sorted(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    out = []
    for row, length in zip(logits.tolist(), lengths.tolist(), strict=True):
        pairs = [(math.inf if math.isnan(x) else -x, position) for position, x in enumerate(row[:length])]
        best = sorted(position for _, position in sorted(pairs)[:k])
        out.append(best + [-1] * (k - len(best)))
    return torch.tensor(out, dtype=torch.int64)


def _slots(
    logits: Tensor, lengths: Tensor, k: int, page_table: Tensor | None = None, num_queries: int = 1, page_size: int = 64
) -> Tensor:
    rows = _sorted(logits, lengths, k).tolist()
    if page_table is not None:
        table = page_table.tolist()
        rows = [
            [-1 if p < 0 else table[t // num_queries][p // page_size] * page_size + p % page_size for p in row]
            for t, row in enumerate(rows)
        ]
    return torch.tensor(rows, dtype=torch.int32)


def _mask(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    words = (logits.shape[1] + 31) // 32
    masks = [sum(1 << p for p in row if p >= 0) for row in _sorted(logits, lengths, k).tolist()]
    words_of = [[mask >> 32 * w & 0xFFFFFFFF for w in range(words)] for mask in masks]
    return torch.tensor(words_of, dtype=torch.uint32).view(torch.int32)


_ORACLES = {"topk": _sorted, "topk_slots": _slots, "topk_mask": _mask}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_sorted_pairs(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _ORACLES[case.function])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*CASES, *LONG_CASES], ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_the_reference(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [4096, 8190, 16_384, 40_001, 140_000])
def test_every_kernel_gives_the_same(columns: int) -> None:
    """Whatever number of threads and blocks a row gets, and whatever the output is."""
    kernel = pytest.importorskip("baleen.kernels.topk.cuda_kernel")
    logits = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    logits[1, ::3] = logits[1, 0]
    lengths = torch.tensor([columns, columns - 7, columns // 2, 2049, 100])
    pages = torch.randperm(5 * (columns // 64 + 1)).view(5, -1)
    expected = (
        reference.topk(logits, lengths, 2048),
        reference.topk_slots(logits, lengths, 2048, pages),
        reference.topk_mask(logits, lengths, 2048),
    )
    inputs = logits.cuda(), lengths.cuda()
    layouts = [layout for layout in kernel.SHORT.values() if columns <= kernel.HELD * layout.threads]
    for layout in [*layouts, kernel.LONG, *kernel.RING.values()]:
        for output, want in enumerate(expected):
            out = torch.full_like(want, -7, device="cuda")
            kernel._launch(*inputs, 2048, output, out, pages.cuda() if output == 1 else None, layout=layout)
            assert torch.equal(out.cpu(), want), (layout.name, output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_chosen_can_hold_the_row() -> None:
    kernel = pytest.importorskip("baleen.kernels.topk.cuda_kernel")
    for columns in (1, 4096, 4097, 8192, 8193, 16_384, 16_385, 32_768, 131_072, 1 << 24):
        for rows in (1, 16, 17, 64, 66, 67, 132, 133, 4096):
            layout = kernel.choose(rows, columns, 132)
            is_long = layout == kernel.LONG or layout in kernel.RING.values()
            assert is_long or columns <= kernel.HELD * layout.threads
            assert layout == kernel.LONG or not is_long or rows * layout.blocks <= 132


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_gives_what_its_inputs_now_say() -> None:
    logits, lengths = torch.randn(3, 40_000, device="cuda"), torch.tensor([40_000, 9_000, 100], device="cuda")
    pages = torch.arange(3 * 625, device="cuda").view(3, 625)
    topk(logits, lengths, 2048)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = topk(logits, lengths, 2048)
        slots = topk_slots(logits, lengths, 2048, pages)
    for seed in range(3):
        logits.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        lengths.copy_(torch.tensor([39_000 - seed, 8_000 + 500 * seed, 3_000]))
        graph.replay()
        assert torch.equal(out.cpu(), reference.topk(logits.cpu(), lengths.cpu(), 2048))
        assert torch.equal(
            slots, torch.where(out < 0, out, out + 40_000 * torch.arange(3, device="cuda")[:, None]).int()
        )


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


def test_slots_and_masks_by_hand() -> None:
    logits = torch.zeros(3, 70)
    logits[:, [0, 31, 32, 69]] = 1.0
    lengths = torch.tensor([70, 70, 32])
    pages = torch.tensor([[5, 9], [7, 0]], dtype=torch.int32)
    assert topk_slots(logits, lengths, 4, pages, 2).tolist() == [
        [320, 351, 352, 581],
        [320, 351, 352, 581],
        [448, 449, 450, 479],
    ]
    assert topk_slots(logits, lengths, 3).tolist() == [[0, 31, 32], [0, 31, 32], [0, 1, 31]]
    top = -(1 << 31)  # bit 31 alone
    assert topk_mask(logits, lengths, 4).tolist() == [[top + 1, 1, 32], [top + 1, 1, 32], [top + 7, 0, 0]]
    assert topk_mask(logits, lengths, 70).tolist() == [[-1, -1, 63], [-1, -1, 63], [-1, 0, 0]]


def test_a_tie_in_one_row_does_not_hide_a_shortage_in_another() -> None:
    """One row's tied surplus and another's NaN shortage add up to k of each; the rows must not be cut at k blindly."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [math.nan, 2.0, 0.0, 1.0]])
    assert topk(logits, torch.tensor([4, 4]), 2).tolist() == [[0, 1], [1, 3]]


def test_no_rows_and_no_columns() -> None:
    assert topk(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 4).shape == (0, 4)
    assert topk(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), 2).tolist() == [[-1, -1], [-1, -1]]
    assert topk_mask(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), 2).shape == (2, 0)
    pages = torch.zeros(1, 0, dtype=torch.int64)
    assert topk_slots(torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), 2, pages).tolist() == [[-1, -1]]


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        topk(torch.zeros(1, 4), torch.tensor([4]), 0)


@pytest.mark.parametrize("case", [case for case in CASES if case.function == "topk"][5::6], ids=str)
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
