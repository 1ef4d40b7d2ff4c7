"""CUDA graphs of the decode step: the kernels of a whole forward, up to the likeliest ids, started by two calls.

The first graph holds a single layer: the GPU begins while the host still starts the rest, which takes it longer the
more layers there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.attention.backend import AttentionBackend, Metadata
from baleen.attention.beside import Beside
from baleen.config import PAGE_SIZE, SchedulerConfig
from baleen.kernels.decode_outputs import decode_outputs
from baleen.model.deepseek_v32 import DeepseekV32ForCausalLM, Stream
from baleen.runner.inputs import DecodeRows, RequestSlots
from baleen.runner.outputs import Places, SampledIds

WARMUPS = 2  # compile what is compiled at first use, and let the kernels make what they keep


class Decoded(NamedTuple):
    """What a decode step of R rows gave.

    logits     [R, vocab] float32, overwritten by the next step
    likeliest  ids of each row, -1 where the logits are bad; they are the slots' last ids already
    """

    logits: Tensor
    likeliest: SampledIds


class _Captured(NamedTuple):
    """A step's graphs, in order, what they read and what they write."""

    first: torch.cuda.CUDAGraph
    rest: torch.cuda.CUDAGraph
    rows: DecodeRows
    places: Places
    logits: Tensor


class DecodeGraphs:
    """A step's graphs for each padded batch size and context, captured when first needed.

    Batches are padded to 1, 2, 4 or a multiple of 8 rows with the slot `RequestSlots.padding`, whose token goes to
    page 0. Contexts are padded to index_topk (where nothing is scored), then to twice as much, and so on: index logits,
    top-k and page table are as wide as that, though no more than each row's own length is scored.
    """

    def __init__(
        self,
        model: DeepseekV32ForCausalLM,
        backend: AttentionBackend,
        slots: RequestSlots,
        *,
        max_batch: int,
        context_length: int,
    ) -> None:
        self._model, self._backend, self._slots = model, backend, slots
        self._sizes = padded_sizes(max_batch)
        self._contexts = padded_contexts(backend.index_topk, context_length)
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._beside = Beside(torch.cuda.Stream())

    def fits(self, num_rows: int) -> bool:
        """True if a decode step of so many rows has a graph."""
        return num_rows <= self._sizes[-1]

    def run(self, slots: list[int], positions: list[int]) -> Decoded:
        """The decode step of these slots."""
        num_rows, last = len(slots), max(positions)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        context = self._contexts[bisect_right(self._contexts, last)]
        captured = self._graphs.get((size, context)) or self.capture(size, context)
        captured.rows.put(slots, positions)
        captured.first.replay()
        captured.rows.moved_on()
        captured.places.free()
        captured.rest.replay()
        return Decoded(captured.logits[:num_rows], captured.places.take(num_rows))

    @torch.inference_mode()
    def capture(self, size: int, context: int) -> _Captured:
        """The graphs of such a step, made if they are not there."""
        if (size, context) not in self._graphs:
            self._graphs[size, context] = self._capture(size, context)
        return self._graphs[size, context]

    @torch.inference_mode()
    def compile(self, size: int, context: int) -> None:
        """Run the step of such a graph kernel by kernel, on padding: compiles what is compiled at first use."""
        rows, places = self._inputs(size)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._finish(rows, places, *self._start(rows, context))
        stream.synchronize()  # it writes to the host's memory, which is given back here

    def _capture(self, size: int, context: int) -> _Captured:
        self.compile(size, context)
        rows, places = self._inputs(size)
        first, rest = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads pin memory and wait for events meanwhile, which a stricter mode would forbid them.
        with torch.cuda.graph(first, pool=self._pool, capture_error_mode="thread_local"):
            started = self._start(rows, context)
        with torch.cuda.graph(rest, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._finish(rows, places, *started)
        return _Captured(first, rest, rows, places, logits)

    def _inputs(self, size: int) -> tuple[DecodeRows, Places]:
        return DecodeRows(size, self._slots.padding, self._slots.device), Places(size, self._slots.device)

    def _start(self, rows: DecodeRows, context: int) -> tuple[Metadata, Stream]:
        batch = self._slots.decode_batch(rows.slots, rows.positions, [context] * rows.slots.shape[0])
        metadata = self._backend.plan(batch, self._beside)
        return metadata, self._model.start(batch.ids, batch.positions, self._backend, metadata)

    def _finish(self, rows: DecodeRows, places: Places, metadata: Metadata, stream: Stream) -> Tensor:
        logits, ids = self._model.likeliest(self._model.finish(stream, self._backend, metadata))
        decode_outputs(
            ids,
            rows.slots,
            self._slots.last_ids,
            rows.positions,
            rows.advance,
            places.turns,
            places.places,
        )
        return logits


def largest_batch(scheduler: SchedulerConfig) -> int:
    """Rows of the largest graph."""
    return min(scheduler.max_running_requests, scheduler.cuda_graph_max_bs or scheduler.max_running_requests)


def usual_shapes(max_batch: int, index_topk: int, context_length: int) -> list[tuple[int, int]]:
    """Size and context of graphs that together use every kernel: each size at the shortest context that is scored, the
    largest size at all contexts.
    """
    sizes, contexts = padded_sizes(max_batch), padded_contexts(index_topk, context_length)
    scored = contexts[min(1, len(contexts) - 1)]
    return list(dict.fromkeys([(size, scored) for size in sizes] + [(sizes[-1], context) for context in contexts]))


def padded_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... max_batch."""
    return [size for size in (1, 2, 4) if size < max_batch] + [*range(8, max_batch, 8)] + [max_batch]


def padded_contexts(index_topk: int, context_length: int) -> list[int]:
    """index_topk, twice it, four times, ... the context, in whole pages."""
    contexts = []
    context = index_topk
    while context < context_length:
        contexts.append(context)
        context *= 2
    return [*contexts, -(-context_length // PAGE_SIZE) * PAGE_SIZE]
