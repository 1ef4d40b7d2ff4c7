"""Small kernels beside others, on a second stream of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """A second stream, or none: then everything runs in its place. Works inside a CUDA graph's capture.

    A tensor made on one stream and read on the other must be referred to until the next `join`; nothing else has to be
    said to the allocator, since each `start` waits for what the main stream was given before.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    @contextmanager
    def start(self) -> Iterator[None]:
        """What is launched inside runs beside what the main stream is given afterwards."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The main stream waits for everything that was started."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
