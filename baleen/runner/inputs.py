"""ScheduledBatch -> device tensors. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baleen.attention.batch import ForwardBatch
from baleen.config import PAGE_SIZE
from baleen.kernels.decode_inputs import decode_inputs
from baleen.messages import ScheduledBatch, ScheduledRow


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """Ints, or rows of them, as int64 on the device: from pinned memory, which torch keeps until it is read."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class DecodeRows:
    """Slots and positions of a decode step, on the device, in the place that a CUDA graph reads. The step moves each
    position on by `advance`, so that the next one of the same rows finds its own there and uploads nothing.

    slots, positions, advance  [size] int64; rows beyond those given are padding, at position 0 for good
    """

    def __init__(self, size: int, padding: int, device: torch.device) -> None:
        self._size, self._padding = size, padding
        self._rows = upload([[padding] * size, [0] * size, [0] * size], device)
        self.slots, self.positions, self.advance = self._rows
        self._there: tuple[list[int], list[int]] | None = None  # slots and positions on the device

    def put(self, slots: list[int], positions: list[int]) -> None:
        """The next step's."""
        if self._there == (slots, positions):
            return
        missing = self._size - len(slots)
        rows = [slots + [self._padding] * missing, positions + [0] * missing, [1] * len(slots) + [0] * missing]
        pinned = self._rows.device.type == "cuda"
        self._rows.copy_(torch.tensor(rows, dtype=torch.int64, pin_memory=pinned), non_blocking=True)
        self._there = slots, positions

    def moved_on(self) -> None:
        """The step has been started that moves them."""
        assert self._there is not None
        slots, positions = self._there
        self._there = slots, [position + 1 for position in positions]


class RequestSlots:
    """What the runner remembers of each running request between steps. One slot more than there can be requests,
    `padding`, has no request: all its pages are page 0.

    page_table  [max_running_requests + 1, max_pages] int64 page ids, in order of position; entries past
                `num_pages[slot]` are stale: pages of earlier requests, or 0
    last_ids    [max_running_requests + 1] int64, the id last sampled in the slot; it stays on the device
    """

    def __init__(self, max_running_requests: int, context_length: int, device: torch.device) -> None:
        self.device = device
        self.padding = max_running_requests
        max_pages = -(-context_length // PAGE_SIZE)
        self.page_table = torch.zeros(max_running_requests + 1, max_pages, dtype=torch.int64, device=device)
        self.num_pages = [0] * max_running_requests
        self.last_ids = torch.zeros(max_running_requests + 1, dtype=torch.int64, device=device)

    def update(self, row: ScheduledRow) -> None:
        """Open the slot if the row does, and append its new pages."""
        if row.open is not None:
            self.num_pages[row.slot] = 0
            self._append(row.slot, row.open.pages)
        if row.new_pages:
            self._append(row.slot, row.new_pages)

    def _append(self, slot: int, pages: tuple[int, ...]) -> None:
        first = self.num_pages[slot]
        last = first + len(pages)
        if last > self.page_table.shape[1]:
            raise ValueError(f"slot {slot} is given page {last} of at most {self.page_table.shape[1]}")
        if pages:
            self.page_table[slot, first:last] = upload(pages, self.device)
        self.num_pages[slot] = last

    def remember(self, slots: Tensor, ids: Tensor) -> None:
        """What was sampled in these slots, both [R] int64 on the device."""
        self.last_ids.index_copy_(0, slots, ids)

    def forward_batch(self, batch: ScheduledBatch) -> ForwardBatch:
        """The tensors of a step; `update` has been called for each row."""
        rows = batch.rows
        slots, starts = upload([[row.slot for row in rows], [row.start for row in rows]], self.device)
        seq_lens = [row.start + row.num_tokens for row in rows]
        if batch.only_decodes:
            return self.decode_batch(slots, starts, seq_lens)
        num_decode = 0
        while num_decode < len(rows) and rows[num_decode].num_tokens == 1:
            num_decode += 1
        q_lens = [row.num_tokens for row in rows]
        lens = upload(q_lens, self.device)
        row_of_token = torch.repeat_interleave(lens, output_size=sum(q_lens))
        firsts = lens.cumsum(0) - lens
        positions = torch.arange(row_of_token.shape[0], device=self.device) - (firsts - starts)[row_of_token]
        page_table = self.page_table[slots, : _num_pages(seq_lens)]
        pages = page_table[row_of_token, positions // PAGE_SIZE]
        return ForwardBatch(
            ids=self._ids(batch),
            positions=positions,
            slots=pages * PAGE_SIZE + positions % PAGE_SIZE,
            page_table=page_table,
            q_lens=q_lens,
            seq_lens=seq_lens,
            num_decode=num_decode,
        )

    def decode_batch(self, slots: Tensor, positions: Tensor, seq_lens: list[int]) -> ForwardBatch:
        """The step that computes the last sampled token of each slot.

        slots, positions [R] int64 on the device; seq_lens R host ints, positions + 1 or more
        """
        num_pages = _num_pages(seq_lens)
        inputs = decode_inputs(slots, positions, self.last_ids, self.page_table, num_pages, PAGE_SIZE)
        return ForwardBatch(
            ids=inputs.ids,
            positions=positions,
            slots=inputs.kv_slots,
            page_table=inputs.page_table,
            q_lens=[1] * len(seq_lens),
            seq_lens=seq_lens,
            num_decode=len(seq_lens),
            lengths=(inputs.lengths, inputs.short_lengths),
        )

    def _ids(self, batch: ScheduledBatch) -> Tensor:
        known: list[int] = []
        sampled: list[tuple[int, int]] = []  # place, slot
        for row in batch.rows:
            if not row.token_ids:
                sampled.append((len(known), row.slot))
            known.extend(row.token_ids or (0,))
        ids = upload(known, self.device)
        if sampled:
            places, slots = upload(sampled, self.device).unbind(1)
            ids.index_copy_(0, places, self.last_ids[slots].clamp_min(0))
        return ids


def _num_pages(seq_lens: list[int]) -> int:
    """Pages of the longest request; one at least."""
    return max(1, -(-max(seq_lens) // PAGE_SIZE))
