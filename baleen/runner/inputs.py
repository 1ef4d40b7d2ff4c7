"""ScheduledBatch -> device tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.attention.batch import ForwardBatch
from baleen.config import PAGE_SIZE
from baleen.messages import ScheduledBatch, ScheduledRow


class RequestSlots:
    """What the runner remembers of each running request between steps.

    page_table  [max_running_requests, max_pages] int64 page ids, in order of position; entries past `num_pages[slot]`
                are stale: pages of earlier requests, or 0
    last_ids    [max_running_requests] int64, the id last sampled in the slot; it stays on the device
    """

    def __init__(self, max_running_requests: int, context_length: int, device: torch.device) -> None:
        self.device = device
        max_pages = -(-context_length // PAGE_SIZE)
        self.page_table = torch.zeros(max_running_requests, max_pages, dtype=torch.int64, device=device)
        self.num_pages = [0] * max_running_requests
        self.last_ids = torch.zeros(max_running_requests, dtype=torch.int64, device=device)

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
        self.page_table[slot, first:last] = torch.tensor(pages, dtype=torch.int64)
        self.num_pages[slot] = last

    def forward_batch(self, batch: ScheduledBatch) -> ForwardBatch:
        """The tensors of a step; `update` has been called for each row."""
        rows = batch.rows
        num_decode = 0
        while num_decode < len(rows) and rows[num_decode].num_tokens == 1:
            num_decode += 1
        slots = torch.tensor([row.slot for row in rows], device=self.device)
        positions = torch.tensor([row.start for row in rows], device=self.device)
        row_of_token = None
        if any(row.token_ids for row in rows):
            q_lens = torch.tensor([row.num_tokens for row in rows], device=self.device)
            row_of_token = torch.repeat_interleave(q_lens)
            starts = q_lens.cumsum(0) - q_lens
            positions = torch.arange(row_of_token.shape[0], device=self.device) - (starts - positions)[row_of_token]
        seq_lens = [row.start + row.num_tokens for row in rows]
        width = max(1, -(-max(seq_lens) // PAGE_SIZE))
        page_table = self.page_table[slots, :width]
        of_token = torch.arange(len(rows), device=self.device) if row_of_token is None else row_of_token
        pages = page_table[of_token, positions // PAGE_SIZE]
        return ForwardBatch(
            ids=self._ids(batch, slots),
            positions=positions,
            slots=pages * PAGE_SIZE + positions % PAGE_SIZE,
            page_table=page_table,
            q_lens=[row.num_tokens for row in rows],
            seq_lens=seq_lens,
            num_decode=num_decode,
        )

    def _ids(self, batch: ScheduledBatch, slots: Tensor) -> Tensor:
        if not any(row.token_ids for row in batch.rows):
            return self.last_ids[slots]
        known: list[int] = []
        sampled_at: list[int] = []
        sampled_slot: list[int] = []
        for row in batch.rows:
            if not row.token_ids:
                sampled_at.append(len(known))
                sampled_slot.append(row.slot)
            known.extend(row.token_ids or (0,))
        ids = torch.tensor(known, dtype=torch.int64, device=self.device)
        if sampled_at:
            ids[sampled_at] = self.last_ids[sampled_slot]
        return ids
