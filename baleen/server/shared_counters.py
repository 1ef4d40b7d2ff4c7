"""Numbers that all API processes of a server add to, so that each of them can tell the totals.

Each process has a row of doubles in memory they share and writes to no other; a total is the sum of a column. A process
that is started anew goes on with its row: counters never fall.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

COLUMNS = 4096


class SharedCounters:
    """The memory: `num_rows` rows, of which this process has number `row`.

    path   a file for all processes to map; None: memory of this process alone
    """

    def __init__(self, path: Path | None = None, *, row: int = 0, num_rows: int = 1) -> None:
        size = num_rows * COLUMNS * 8
        if path is None:
            memory = mmap.mmap(-1, size)
        else:
            with path.open("a+b") as file:
                file.truncate(size)  # zeros, where it is new
                memory = mmap.mmap(file.fileno(), size)
        self._all = memoryview(memory).cast("d")
        self.row = self._all[row * COLUMNS : (row + 1) * COLUMNS]
        self._num_columns = 0

    def take(self, count: int) -> int:
        """The first of `count` columns that are free. All processes take the same in the same order."""
        first, self._num_columns = self._num_columns, self._num_columns + count
        assert self._num_columns <= COLUMNS, "raise COLUMNS"
        return first

    def total(self, column: int) -> float:
        """Of all processes."""
        return sum(self._all[column::COLUMNS])


class Counter:
    """One number. A gauge too: a process that ends takes what it holds with it when `reset` in its successor."""

    def __init__(self, counters: SharedCounters) -> None:
        self._counters, self._row = counters, counters.row
        self._column = counters.take(1)

    def inc(self, amount: float = 1.0) -> None:
        self._row[self._column] += amount

    def reset(self) -> None:
        """Forget what this process, or the one before it in its place, has counted."""
        self._row[self._column] = 0.0

    def total(self) -> float:
        return self._counters.total(self._column)


class Histogram:
    """How many values were at most each of `bounds`, and their sum."""

    def __init__(self, counters: SharedCounters, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._counters, self._row = counters, counters.row
        self._first = counters.take(len(bounds) + 2)
        self._sum = self._first + len(bounds) + 1

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times the same value."""
        self._row[self._first + bisect_left(self.bounds, value)] += count
        self._row[self._sum] += value * count

    def total(self) -> tuple[list[float], float]:
        """How many fell between each bound and the one before, those above the last at the end; and the sum."""
        counts = [self._counters.total(column) for column in range(self._first, self._sum)]
        return counts, self._counters.total(self._sum)
