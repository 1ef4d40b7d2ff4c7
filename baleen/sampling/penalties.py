"""Repetition, frequency and presence penalties, and the token counts that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenHistory:
    """What the slots that have penalties have seen. A row of V counts per such slot; the table grows with their number.

    An entry is 2 * (times the token was output) + (1 if it is in the prompt), int32.
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self._max_slots = max_slots
        self._table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []

    def open(self, slot: int, token_ids: Sequence[int], num_prompt: int) -> None:
        """Start `slot` anew with `token_ids`: the first `num_prompt` of them are the prompt, the others were output."""
        if slot not in self._row_of:
            if not self._free:
                self._grow()
            self._row_of[slot] = self._free.pop()
        vocab_size = self._table.shape[1]
        ids = torch.tensor(token_ids, dtype=torch.int64)
        in_prompt = ids[:num_prompt].bincount(minlength=vocab_size) > 0
        num_outputs = ids[num_prompt:].bincount(minlength=vocab_size)
        self._table[self._row_of[slot]] = (2 * num_outputs + in_prompt).to(self._table)

    def close(self, slot: int) -> None:
        """Give the row of `slot` back, if it has one."""
        row = self._row_of.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def rows(self, slots: Sequence[int]) -> list[int]:
        """The rows of open slots, for `penalise` and `record`."""
        return [self._row_of[slot] for slot in slots]

    def penalise(self, logits: Tensor, rows: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
        """Logits less the penalties.

        logits      [R, V] float32
        rows        [R] int64 (`rows`)
        repetition  [R, 1] float32: a logit > 0 of a token in prompt or output is divided by it, one <= 0 multiplied
        frequency   [R, 1] float32: then subtracted for each time the token was output
        presence    [R, 1] float32: then subtracted once if the token was output
        returns     [R, V] float32, new
        """
        entries = self._table.index_select(0, rows)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        num_outputs = entries >> 1
        penalised = torch.where(entries > 0, repeated, logits)
        return penalised.sub_(num_outputs * frequency).sub_((num_outputs > 0) * presence)

    def record(self, rows: Tensor, ids: Tensor) -> None:
        """Count one output token for each row. ids [R] int64; -1 counts nothing."""
        counts = torch.where(ids < 0, 0, 2).to(self._table.dtype)
        self._table.index_put_((rows, ids.clamp(min=0)), counts, accumulate=True)

    def _grow(self) -> None:
        num_rows = self._table.shape[0]
        num_new = min(max(num_rows, 1), self._max_slots - num_rows)
        self._table = torch.cat([self._table, self._table.new_zeros(num_new, self._table.shape[1])])
        self._free.extend(range(num_rows, num_rows + num_new))
