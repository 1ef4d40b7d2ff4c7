"""The shapes that decode graphs are made for, and the padding slot that fills them."""

from __future__ import annotations

import pytest
import torch

from baleen.memory_plan import graph_rows
from baleen.messages import OpenSlot, SamplingParams, ScheduledRow
from baleen.runner.decode_graphs import padded_contexts, padded_sizes, usual_shapes
from baleen.runner.inputs import DecodeRows, RequestSlots


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (5, [1, 2, 4, 5])]
)
def test_batch_sizes(most: int, sizes: list[int]) -> None:
    assert padded_sizes(most) == sizes


@pytest.mark.parametrize(
    ("context", "contexts"),
    [(100, [128]), (2048, [2048]), (2049, [2048, 2112]), (9000, [2048, 4096, 8192, 9024])],
)
def test_contexts(context: int, contexts: list[int]) -> None:
    assert padded_contexts(2048, context) == contexts


@pytest.mark.parametrize("most", [1, 3, 8, 20, 128])
@pytest.mark.parametrize("context", [100, 2048, 2049, 9000, 163840])
def test_the_memory_plan_counts_the_logits_of_the_usual_graphs(most: int, context: int) -> None:
    usual = usual_shapes(most, 2048, context)
    assert {size for size, _ in usual} == set(padded_sizes(most))
    assert {at for size, at in usual if size == most} == set(padded_contexts(2048, context))
    assert graph_rows(most, context, 2048) == sum(size for size, _ in usual)


def test_padding_writes_to_page_0_and_leaves_the_others_as_they_are() -> None:
    slots = RequestSlots(3, 256, torch.device("cpu"))
    opened = OpenSlot(sampling=SamplingParams(), pages=(7, 5), num_prompt=70)
    slots.update(ScheduledRow(slot=1, start=0, token_ids=(1,) * 70, open=opened))
    slots.last_ids[1] = 42
    padded = slots.decode_batch(torch.tensor([1, slots.padding]), torch.tensor([70, 0]), [256, 256])
    assert padded.ids.tolist() == [42, 0]
    assert padded.slots.tolist() == [5 * 64 + 6, 0]
    assert padded.page_table.shape == (2, 4), "as wide as the graph's context"
    assert padded.num_decode == 2
    assert padded.lengths is not None
    for lengths in padded.lengths:
        assert lengths.tolist() == [71, 1]


def test_rows_move_on_by_themselves_and_are_uploaded_when_they_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *args, **more: (uploads.append(1), copy(*args, **more))[1])
    rows = DecodeRows(4, 9, torch.device("cpu"))
    steps = [
        ([1, 5], [70, 3]), ([1, 5], [71, 4]), ([1, 5], [72, 5]),  # one upload
        ([5, 1], [6, 73]),  # the same two, turned round
        ([5, 1], [7, 74]),
        ([5, 1], [7, 74]),  # once more
        ([5, 1, 2, 3], [8, 75, 0, 0]),
        ([5], [9]),
        ([5], [10]),
        ([7], [11]),  # the place that slot 5 would have
    ]  # fmt: skip
    counts = []
    for slots, positions in steps:
        uploads.clear()
        rows.put(slots, positions)
        counts.append(len(uploads))
        missing = 4 - len(slots)
        assert rows.slots.tolist() == slots + [9] * missing
        assert rows.positions.tolist() == positions + [0] * missing, "padding stays at 0"
        rows.positions.add_(rows.advance)  # as the step does
        rows.moved_on()
    assert counts == [1, 0, 0, 1, 0, 1, 1, 1, 0, 1]
