"""Ids on their way to the host: read late, in any order, by other threads; and what the clock of forwards counts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from baleen.kernels.decode_outputs import decode_outputs
from baleen.runner.outputs import ForwardClock, Places, SampledIds

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class _Event:
    """Stands in for torch.cuda.Event: has ended once it is told so; time is the number of the record."""

    clock = 0.0

    def __init__(self, **options: Any) -> None:
        self.at, self.ended = 0.0, False

    def record(self) -> None:
        _Event.clock += 1
        self.at, self.ended = _Event.clock, False

    def query(self) -> bool:
        return self.ended

    def elapsed_time(self, other: _Event) -> float:
        return 1000 * (other.at - self.at)


def _step(places: Places, ids: list[int]) -> SampledIds:
    """One step, which writes as a captured one does; its graph may have more rows than the batch."""
    places.free()
    rows = torch.tensor(ids + [-5] * (places.turns.shape[0] - len(ids)), device=places.turns.device)
    nothing = torch.zeros_like(rows)
    decode_outputs(rows, nothing, nothing.clone(), nothing.clone(), nothing, places.turns, places.places)
    return places.take(len(ids))


@pytest.mark.parametrize("device", DEVICES)
def test_ids_are_read_whenever_somebody_asks(device: str) -> None:
    places = Places(4, torch.device(device))
    steps = [_step(places, [10 * step, 10 * step + 1, 10 * step + 2]) for step in range(3 * Places.STEPS)]
    for step in reversed(range(len(steps))):
        assert steps[step].read() == (10 * step, 10 * step + 1, 10 * step + 2), "of its own step, however late"
    assert _step(places, [7, 8]).read() == (7, 8), "fewer rows"


def test_a_place_that_nobody_has_read_is_read_before_it_is_written() -> None:
    places = Places(2, CPU)
    first = _step(places, [1])
    first._ids = None
    reads = []
    first._arrived = type("Event", (), {"synchronize": lambda self: reads.append(1)})()  # type: ignore[assignment]
    for step in range(Places.STEPS - 1):
        _step(places, [step])
        assert not reads, "its place is not written yet"
    places.free()
    assert reads
    assert first.read() == (1,)
    assert len(reads) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_copied_and_none(device: str) -> None:
    assert SampledIds.copied(torch.tensor([3, -1], device=device)).read() == (3, -1)
    assert SampledIds.none(torch.device(device)).read() == ()


def test_a_step_that_samples_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    event = type("Event", (), {"record": lambda self: None, "synchronize": lambda self: waits.append(1)})
    monkeypatch.setattr(torch.cuda, "Event", event)
    ids = SampledIds.none(torch.device("cuda"))
    assert not waits
    assert ids.read() == ()
    assert waits


def test_the_clock_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1.0, 3.0, 10.0, 10.5))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = ForwardClock(CPU)
    for _ in range(2):
        clock.start()
        clock.stop()
    assert clock.seconds == 2.5
    clock.reset()
    assert clock.seconds == 0


def test_the_clock_of_a_gpu_counts_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    clock = ForwardClock(torch.device("cuda"))

    def forward() -> None:
        clock.start()
        clock.stop()

    forward()
    forward()
    assert clock.seconds == 0, "both run"
    clock._running[0][1].ended = True
    forward()
    assert clock.seconds == 1
    for _, end in clock._running:
        end.ended = True
    forward()
    assert clock.seconds == 3, "the last one has only been started"
    clock.reset()
    forward()
    forward()
    assert clock.seconds == 0, "nor do those from before count later"
