"""Sampled ids on their way to the host, and the time that forwards take. Nothing here waits unless it is asked for."""

from __future__ import annotations

import time
from collections import deque
from threading import Lock
from types import SimpleNamespace

import torch
from torch import Tensor


class SampledIds:
    """The ids of a step. The next step may be started before; any thread may ask."""

    def __init__(self, host: Tensor, *, arrives: bool) -> None:
        """host: [R] int64, R may be 0; where they are, or will be (`arrives`) once the stream's work so far has been
        done. Nothing else may be written there before `read`.
        """
        self._host, self._ids = host, None if arrives else tuple(host.tolist())
        self._lock = Lock()
        self._arrived = torch.cuda.Event() if arrives else None
        if self._arrived is not None:
            self._arrived.record()

    @classmethod
    def none(cls, device: torch.device) -> SampledIds:
        """Of a step that samples nothing: it is read once the step has ended."""
        return cls(torch.empty(0, dtype=torch.int64), arrives=device.type == "cuda")

    @classmethod
    def copied(cls, ids: Tensor) -> SampledIds:
        """Of ids [R] int64 on any device."""
        if ids.device.type == "cpu":
            return cls(ids, arrives=False)
        host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        host.copy_(ids, non_blocking=True)
        return cls(host, arrives=True)

    def read(self) -> tuple[int, ...]:
        """The ids, once they are here."""
        with self._lock:
            if self._ids is None:
                assert self._arrived is not None
                self._arrived.synchronize()
                self._ids = tuple(self._host.tolist())
            return self._ids


class Places:
    """Pinned memory that a captured step writes its ids to, of several steps in turn.

    places  [STEPS, size] int64, as the device sees it
    turns   [size] int64 on the device: which of them is next, modulo STEPS; each step counts on
    """

    STEPS = 4  # an engine has two in flight and has read the others, so that `free` waits for nothing

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.empty(self.STEPS, size, dtype=torch.int64, pin_memory=on_gpu)
        self.places = _as_seen_by(device, self._host) if on_gpu else self._host
        self.turns = torch.zeros(size, dtype=torch.int64, device=device)
        self._written: list[SampledIds | None] = [None] * self.STEPS
        self._turn = 0

    def free(self) -> None:
        """Before a step is started: what lies in its place is read if nobody has read it."""
        before = self._written[self._turn]
        if before is not None:
            before.read()

    def take(self, num_rows: int) -> SampledIds:
        """After it: the ids of its first rows."""
        ids = SampledIds(self._host[self._turn, :num_rows], arrives=self.turns.is_cuda)
        self._written[self._turn] = ids
        self._turn = (self._turn + 1) % self.STEPS
        return ids


def _as_seen_by(device: torch.device, pinned: Tensor) -> Tensor:
    """A tensor on the device over the same memory, which `pinned` keeps."""
    interface = {
        "shape": tuple(pinned.shape), "typestr": "<i8", "data": (pinned.data_ptr(), False), "strides": None,
        "version": 3,
    }  # fmt: skip
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)


class ForwardClock:
    """Seconds of forwards: on a GPU between two events of its stream, on a CPU by the host's clock.

    seconds  of those that had ended when the last one was started
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._on_gpu = device.type == "cuda"
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = 0.0

    def start(self) -> None:
        """Before a forward."""
        if not self._on_gpu:
            self._started = time.perf_counter()
            return
        begin, end = self._free.pop() if self._free else (_timed(), _timed())
        begin.record()
        self._running.append((begin, end))

    def stop(self) -> None:
        """After it."""
        if not self._on_gpu:
            self.seconds += time.perf_counter() - self._started
            return
        self._running[-1][1].record()
        while len(self._running) > 1 and self._running[0][1].query():
            begin, end = self._running.popleft()
            self.seconds += begin.elapsed_time(end) / 1000
            self._free.append((begin, end))

    def reset(self) -> None:
        """Forget what was, and what still runs."""
        self.seconds = 0.0
        self._running.clear()


def _timed() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
