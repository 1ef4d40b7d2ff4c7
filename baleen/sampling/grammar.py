"""Grammar masks: which tokens may come next in each slot, worked out on a thread of its own while the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from baleen.messages import OpenSlot, RowError
from baleen.sampling.grammar_compiler import SLOW_MASK_SECONDS
from baleen.sampling.grammar_text import load_xgrammar


class GrammarMasks:
    """The grammar of each slot that has one, where its output stands in it, and the mask that follows.

    `open` and `advance` only hand work to the mask thread, which takes it in order; `mask` waits for it. Between the
    `advance` of a step and the `mask` of the next lies that step's forward, which hides the work.

    mask_seconds  time the thread worked
    wait_seconds  time `mask` waited for it: what the forward did not hide
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.mask_seconds = 0.0
        self.wait_seconds = 0.0
        self._device = torch.device(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._work: Future[None] | None = None  # what was handed over last
        self._slots: dict[int, _SlotGrammar] = {}
        # One bit for each token, 0 for the forbidden. Row = slot; the mask thread writes, `mask` reads.
        self._bits = torch.full((max_slots, -(-vocab_size // 32)), -1, dtype=torch.int32)

    def open(self, slot: int, opened: OpenSlot, compiled: Any) -> None:
        """Give `slot` to a request and forget the one before. The output in `opened.history` is read again.

        compiled  the xgrammar.CompiledGrammar of the request's grammar; None if it has none
        """
        self._slots.pop(slot, None)
        if compiled is None:
            return
        grammar = self._slots[slot] = _SlotGrammar(opened, compiled, self._bits[slot])
        output = opened.history[opened.num_prompt :]
        self._work = self._thread.submit(self._advance, [(grammar, output)])

    def has_any(self, slots: Sequence[int]) -> bool:
        """True if one of these slots has a grammar."""
        return bool(self._slots) and any(slot in self._slots for slot in slots)

    def mask(self, logits: Tensor, slots: Sequence[int]) -> tuple[Tensor, tuple[RowError, ...]]:
        """The logits [R, V] with -inf for what the slots' grammars forbid, and the rows whose grammar has failed.

        A row always keeps a token; that of a slot whose text has ended, or whose grammar failed, is as it was. The
        argument is left as it is.
        """
        rows = [(row, self._slots[slot]) for row, slot in enumerate(slots) if slot in self._slots]
        if not rows:
            return logits, ()
        if self._work is not None:
            started = time.perf_counter()
            self._work.result()
            self.wait_seconds += time.perf_counter() - started
        errors = tuple(RowError(row, *grammar.error) for row, grammar in rows if grammar.error is not None)
        masked = [row for row, grammar in rows if grammar.constrains]
        if masked:
            logits = logits.clone()
            bits = self._bits[list(slots)]
            if self._device.type == "cuda":
                bits = bits.pin_memory().to(self._device, non_blocking=True)
            load_xgrammar().apply_token_bitmask_inplace(logits, bits, indices=masked)
        return logits, errors

    def advance(self, slots: Sequence[int], token_ids: Callable[[], Sequence[int]]) -> None:
        """Take the tokens sampled in these slots and work out what may follow them.

        token_ids  called on the mask thread, where it may wait for the device; -1 for a row that failed
        """
        rows = [(row, self._slots[slot]) for row, slot in enumerate(slots) if slot in self._slots]
        if rows:
            self._work = self._thread.submit(self._advance_rows, rows, token_ids)

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    # ---- on the mask thread ------------------------------------------------------------------------------------------

    def _advance_rows(self, rows: Sequence[tuple[int, _SlotGrammar]], token_ids: Callable[[], Sequence[int]]) -> None:
        ids = token_ids()
        self._advance([(grammar, ids[row : row + 1]) for row, grammar in rows])

    def _advance(self, steps: Sequence[tuple[_SlotGrammar, Sequence[int]]]) -> None:
        started = time.perf_counter()
        for grammar, token_ids in steps:
            grammar.advance(token_ids)
        self.mask_seconds += time.perf_counter() - started


class _SlotGrammar:
    """One request's way through its grammar.

    constrains  the bits forbid some token
    error       why the request has to end: status, message
    """

    def __init__(self, opened: OpenSlot, compiled: Any, bits: Tensor) -> None:
        self.constrains = False
        self.error: tuple[int, str] | None = None
        sampling = opened.sampling
        self._kind = "" if sampling.grammar is None else sampling.grammar.kind
        self._free_until = None if sampling.grammar is None else sampling.grammar.starts_after
        self._matcher = load_xgrammar().GrammarMatcher(compiled)
        self._bits = bits
        self._free_bits: Tensor | None = None
        if sampling.ignore_eos and self._free_until is not None:
            # The eos that ends the grammar's text ends the request, so there may be none before.
            self._free_bits = torch.full_like(bits, -1)
            for token_id in self._matcher.stop_token_ids:
                self._free_bits.view(torch.uint8)[token_id // 8] &= 0xFF ^ (1 << token_id % 8)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Follow the output by these tokens, then write the mask of the next."""
        if self.error is not None:
            return
        started = time.perf_counter()
        try:
            for token_id in token_ids:
                self._accept(token_id)
            self._write_mask()
        except Exception as error:  # of the library; the other requests go on
            self._fail(500, f"{type(error).__name__}: {error}")
        if time.perf_counter() - started > SLOW_MASK_SECONDS * max(1, len(token_ids)):
            self._fail(400, f"too ambiguous: a step took over {SLOW_MASK_SECONDS:g} s")

    def _accept(self, token_id: int) -> None:
        if self._free_until is not None:
            if token_id == self._free_until:
                self._free_until = None
        elif token_id >= 0 and not self._matcher.is_terminated() and not self._matcher.accept_token(token_id):
            self._fail(500, f"token {token_id} was sampled against the grammar")

    def _write_mask(self) -> None:
        self.constrains = False
        if self._free_until is not None:
            if self._free_bits is not None:
                self._bits.copy_(self._free_bits)
                self.constrains = True
        elif self.error is None and not self._matcher.is_terminated():
            self.constrains = self._matcher.fill_next_token_bitmask(self._bits[None])
            if self.constrains and not self._bits.any():
                self._fail(400, "no token can follow")

    def _fail(self, status: int, problem: str) -> None:
        self.constrains = False
        if self.error is None:
            self.error = (status, f"{self._kind}: {problem}")
