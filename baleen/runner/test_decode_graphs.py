"""The shapes that decode graphs are made for, the padding slot that fills them, and what their steps give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baleen.attention.beside import Beside
from baleen.flags import default_config
from baleen.memory_plan import graph_rows
from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
from baleen.model.random_checkpoint import SIZES, official_config, write_random_checkpoint
from baleen.runner.decode_graphs import DecodeGraphs, _Captured, padded_contexts, padded_sizes, usual_shapes
from baleen.runner.inputs import DecodeRows, RequestSlots
from baleen.runner.model_runner import ModelRunner
from baleen.runner.outputs import Places, SampledIds


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


class Late(Places):
    """Whose ids are looked at when somebody reads them, as on a GPU."""

    def take(self, num_rows: int) -> SampledIds:
        ids = super().take(num_rows)
        arrived: Any = SimpleNamespace(synchronize=lambda: None)
        ids._ids, ids._arrived = None, arrived
        return ids


class Replayed(DecodeGraphs):
    """On a CPU, where nothing can be captured: each replay runs what its graph would have been captured from."""

    def __init__(self, runner: ModelRunner, max_batch: int, context_length: int) -> None:
        self._model, self._backend, self._slots = runner.model, runner.backend, runner.slots
        self._sizes = padded_sizes(max_batch)
        self._contexts = padded_contexts(runner.backend.index_topk, context_length)
        self._graphs = {}
        self._beside = Beside()
        self.replays: list[str] = []

    def _capture(self, size: int, context: int) -> _Captured:
        rows, places = DecodeRows(size, self._slots.padding, self._slots.device), Late(size, self._slots.device)
        logits = torch.empty(size, self._model.config.vocab_size)
        started: list[Any] = []

        def first() -> None:
            self.replays.append("first")
            started[:] = self._start(rows, context)

        def rest() -> None:
            self.replays.append("rest")
            logits.copy_(self._finish(rows, places, *started))

        graphs: list[Any] = [SimpleNamespace(replay=replay) for replay in (first, rest)]
        return _Captured(*graphs, rows, places, logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, official_config(**SIZES["tiny"]))
    return path


def _runner(folder: Path, *, graphs: bool) -> ModelRunner:
    """Of three requests at most, exact but for float32's rounding."""
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": "float32", "device": "cpu"}
    config = default_config(folder, max_running_requests=3, max_total_tokens=2048, context_length=256, **settings)
    runner = ModelRunner(config)
    if graphs:
        runner.graphs = Replayed(runner, 4, 256)
    return runner


def _tokens(folder: Path, temperatures: tuple[float, ...], *, graphs: bool) -> list[tuple[int, ...]]:
    """Of a few steps, which are all started before one is read. The second request ends early; on the way the others
    change places, and stay away once; one position needs a wider context."""
    lengths = (100, 77, 125)
    runner = _runner(folder, graphs=graphs)
    launched = []
    for slot, (length, temperature) in enumerate(zip(lengths, temperatures)):
        prompt = tuple((7 * i * (slot + 1)) % 250 + 3 for i in range(length))
        sampling = SamplingParams(temperature=temperature, seed=slot)
        pages = tuple(range(1 + 4 * slot, 5 + 4 * slot))
        opened = OpenSlot(sampling=sampling, pages=pages, num_prompt=length)
        launched.append(
            runner.execute(ScheduledBatch(slot, (ScheduledRow(slot=slot, start=0, token_ids=prompt, open=opened),)))
        )
    starts = list(lengths)
    for number, slots in enumerate([(0, 1, 2)] * (Places.STEPS + 4) + [(0, 2), (2, 0), (2,), (2, 0), (2, 0)]):
        rows = tuple(ScheduledRow(slot=slot, start=starts[slot]) for slot in slots)
        launched.append(runner.execute(ScheduledBatch(number, rows)))
        for slot in slots:
            starts[slot] += 1
    if graphs:
        assert isinstance(runner.graphs, Replayed)
        assert runner.graphs.replays == (Places.STEPS + 9) * ["first", "rest"]
        assert set(runner.graphs._graphs) == {(4, 128), (4, 256), (2, 256), (1, 256)}
        there = runner.graphs._graphs[2, 256].rows._there
        assert there == ([2, 0], [starts[2], starts[0]]), "the next step of the same rows uploads nothing"
    return [step.wait().token_ids for step in launched]


@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
def test_steps_of_graphs_give_the_tokens_of_other_steps(folder: Path, temperatures: tuple[float, ...]) -> None:
    expected = _tokens(folder, temperatures, graphs=False)
    assert len(set(expected)) > 10
    assert _tokens(folder, temperatures, graphs=True) == expected


@pytest.mark.parametrize("graphs", [False, True])
def test_a_prompt_beside_a_decode_row(folder: Path, graphs: bool) -> None:
    """In one step they give the tokens that they give in steps of their own."""

    def row(slot: int, start: int, *token_ids: int) -> ScheduledRow:
        opened = None
        if token_ids:
            pages = tuple(range(1 + 4 * slot, 5 + 4 * slot))
            sampling = SamplingParams(temperature=0.0)
            opened = OpenSlot(sampling=sampling, pages=pages, num_prompt=len(token_ids))
        return ScheduledRow(slot=slot, start=start, token_ids=token_ids, open=opened)

    def tokens(*steps: tuple[ScheduledRow, ...]) -> list[int]:
        runner = _runner(folder, graphs=graphs)
        launched = [runner.execute(ScheduledBatch(number, rows)) for number, rows in enumerate(steps)]
        return [token for step in launched for token in step.wait().token_ids]

    before = row(0, 0, *range(10, 110))
    decode, prompt = row(0, 100), row(1, 0, *range(50, 130))
    expected = tokens((before,), (decode,), (prompt,))
    assert len(set(expected)) == 3
    assert tokens((before,), (decode, prompt)) == expected
