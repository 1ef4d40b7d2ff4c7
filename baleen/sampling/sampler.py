"""Logits to token ids, for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.kernels.greedy import greedy
from baleen.messages import OpenSlot, SamplingParams, TokenLogprobs
from baleen.sampling import filters, noise
from baleen.sampling.logprobs import prompt_logprobs, token_logprobs
from baleen.sampling.penalties import TokenHistory
from baleen.sampling.token_bias import TokenBias

# What a slot needs besides argmax, as bits. A slot that samples has exactly one of the first three.
_RACE = 1  # all tokens stay, or min_p alone: nothing to sort
_NARROW = 2  # top_k <= _NARROW_WIDTH: the likeliest top_k tokens are enough
_WIDE = 4  # top_p, or a large top_k
_HISTORY = 8
_LOGPROBS = 16
_BIAS = 32
_HOLD = 64  # less than min_new_tokens so far: not of a slot, but of a slot and a position

_NARROW_WIDTH = 256

# A nucleus seldom holds more tokens than this, and ranking 64 of 4096 costs a tenth of sorting them.
_NUCLEUS_WIDTH = 64

# Below this a temperature is 0, as in SGLang.
_MIN_TEMPERATURE = 1e-6

# The logits of a prompt are made so many at a time: 32 MiB, 64 positions of the released model.
_PROMPT_ELEMENTS = 2**23

# Rows are taken in chunks of this many logits: the int64 temporaries of one chunk take 16 MiB each.
_CHUNK_ELEMENTS = 2**21


class SampledTokens(NamedTuple):
    """What one step gave.

    ids       [R] int64 on the sampler's device; -1 where the logits held NaN or +inf, or nothing but -inf
    logprobs  one entry per row, None for a row that asked for none or has id -1; None if no row asked
    """

    ids: Tensor
    logprobs: list[TokenLogprobs | None] | None


class Sampler:
    """The sampling state of every slot, and the pipeline: penalties, token biases, temperature, top-k, top-p, min-p,
    draw.

    The draw is an exponential race: with e_i exponential of mean 1, argmax(p_i / e_i) is token i with probability p_i
    (Gumbel-max without its outer logarithm). e_i depends on (seed, position, i) only, so a token depends on no other
    row of the batch, and logits that change a little change few tokens. Greedy rows are argmax, the lowest id of
    equals.
    """

    def __init__(
        self, max_slots: int, vocab_size: int, device: torch.device | str, eos_token_ids: Sequence[int] = ()
    ) -> None:
        """eos_token_ids: what min_new_tokens holds back besides stop ids. ValueError: vocab_size > MAX_VOCAB_SIZE."""
        if vocab_size > filters.MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {vocab_size}, the sampler holds at most {filters.MAX_VOCAB_SIZE}")
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._token_ids = torch.arange(vocab_size, device=self._device)[None]
        self._chunk_rows = max(1, _CHUNK_ELEMENTS // vocab_size)
        self._flags = [0] * max_slots
        self._top_k = [0] * max_slots
        self._num_top = [0] * max_slots
        # temperature, top_p, min_p, repetition, frequency, presence penalty; float64 so that a top_p of 0.9 is 0.9
        self._numbers = torch.zeros(max_slots, 6, dtype=torch.float64, device=self._device)
        # random stream, top_k (vocab_size: all)
        self._integers = torch.zeros(max_slots, 2, dtype=torch.int64, device=self._device)
        self._hold_until = [0] * max_slots  # position of the first token that may end the request
        self._history = TokenHistory(max_slots, vocab_size, self._device)
        self._bias = TokenBias(vocab_size, eos_token_ids, self._device)

    def open(self, slot: int, opened: OpenSlot) -> None:
        """Give `slot` to a request and forget the one before. A seed of None is 0."""
        params = opened.sampling
        flags = self._flags[slot] = self._flags_of(params)
        self._num_top[slot] = params.logprobs or 0
        top_k = self._top_k[slot] = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        self._integers[slot] = self._upload([noise.stream_of(params.seed or 0), top_k])[0]
        numbers = [params.temperature, params.top_p, params.min_p]
        numbers += [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]
        pinned = self._device.type == "cuda"
        self._numbers[slot].copy_(torch.tensor(numbers, dtype=torch.float64, pin_memory=pinned), non_blocking=True)
        if flags & _HISTORY:
            self._history.open(slot, opened.history, opened.num_prompt)
        else:
            self._history.close(slot)
        self._hold_until[slot] = opened.num_prompt + params.min_new_tokens if params.min_new_tokens else 0
        self._bias.open(slot, opened)

    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], unmasked: Tensor | None = None
    ) -> SampledTokens:
        """One token per row; the penalties of later calls count it.

        logits     [R, V] float32, left as they are; R may be 0. -inf, by a grammar, stays out whatever the request adds
        unmasked   [R, V] float32, the logits before grammars, for the logprobs; None: the same
        slots      [R], open and all different
        positions  [R], the position in its request of the token being sampled
        Cost:      does not wait for the device, unless a row wants logprobs.
        """
        flags = self._flags_at(slots, positions)
        wanted = reduce(or_, flags, 0)
        if not wanted:
            return SampledTokens(greedy(logits), None)
        chunks = []
        for start in range(0, len(slots), self._chunk_rows):
            chunk = slice(start, start + self._chunk_rows)
            chunks.append(self._sample_chunk(logits[chunk], flags[chunk], slots[chunk], positions[chunk]))
        ids = torch.cat(chunks)
        if not wanted & _LOGPROBS:
            return SampledTokens(ids, None)
        return SampledTokens(ids, self._logprobs(logits if unmasked is None else unmasked, ids, flags, slots))

    def takes_likeliest(self, slots: Sequence[int], positions: Sequence[int]) -> bool:
        """True if `sample` would give each row nothing but the likeliest id of its logits."""
        return not any(self._flags_at(slots, positions))

    def prompt_logprobs(
        self, slot: int, head: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Sequence[int]
    ) -> tuple[TokenLogprobs, ...]:
        """`logprobs.prompt_logprobs` with the number of likeliest tokens that the slot's request asked for."""
        rows = max(1, _PROMPT_ELEMENTS // self._vocab_size)
        return prompt_logprobs(head, hidden, token_ids, self._num_top[slot], rows)

    def _flags_at(self, slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        return [
            self._flags[slot] | (_HOLD if position < self._hold_until[slot] else 0)
            for slot, position in zip(slots, positions, strict=True)
        ]

    def _flags_of(self, params: SamplingParams) -> int:
        flags = _HISTORY if params.has_penalties else 0
        if params.logprobs is not None:
            flags |= _LOGPROBS
        if params.logit_bias:
            flags |= _BIAS
        if params.temperature < _MIN_TEMPERATURE or params.top_k == 1:
            return flags
        if 0 < params.top_k < self._vocab_size:
            return flags | (_NARROW if params.top_k <= _NARROW_WIDTH else _WIDE)
        return flags | (_WIDE if params.top_p < 1 else _RACE)

    def _sample_chunk(
        self, logits: Tensor, flags: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        remembering = _rows_with(flags, _HISTORY)
        if remembering:
            row_slots = [slots[row] for row in remembering]
            history_rows = self._history.rows(row_slots)
            remembering_rows, state, table_rows = self._upload(remembering, row_slots, history_rows)
            repetition, frequency, presence = self._numbers[state, 3:].float().split(1, dim=1)
            penalised = self._history.penalise(logits[remembering_rows], table_rows, repetition, frequency, presence)
            logits = logits.index_copy(0, remembering_rows, penalised)
        for kind, change in ((_BIAS, self._bias.add), (_HOLD, self._bias.hold_back)):
            changing = _rows_with(flags, kind)
            if changing:
                (rows,) = self._upload(changing)
                logits = logits.index_copy(0, rows, change(logits[rows], [slots[row] for row in changing]))
        largest, ids = logits.max(dim=1)
        for kind in (_RACE, _NARROW, _WIDE):
            drawing = _rows_with(flags, kind)
            if drawing:
                row_slots = [slots[row] for row in drawing]
                drawn_rows, state, at = self._upload(drawing, row_slots, [positions[row] for row in drawing])
                if len(drawing) == len(slots):
                    ids = self._draw(kind, logits, largest, row_slots, state, at)
                else:
                    drawn = self._draw(kind, logits[drawn_rows], largest[drawn_rows], row_slots, state, at)
                    ids.index_copy_(0, drawn_rows, drawn)
        ids = _checked(ids, largest)
        if remembering:
            self._history.record(table_rows, ids[remembering_rows])
        return ids

    def _draw(
        self, kind: int, logits: Tensor, largest: Tensor, slots: Sequence[int], state: Tensor, positions: Tensor
    ) -> Tensor:
        """Draw for rows of one kind. `largest` [R] is the row maximum, `state` [R] the slots as a tensor."""
        temperature, top_p, min_p = self._numbers[state, :3].unbind(dim=1)
        stream, top_k = self._integers[state].unbind(dim=1)
        # The largest logit is taken off first: the largest weight is exactly 1, and no temperature overflows.
        weights = (logits - largest[:, None]).div_(temperature.float()[:, None]).exp_()
        keys = noise.row_keys(stream, positions)
        if kind == _RACE:
            weights.masked_fill_(weights < min_p.float()[:, None], 0)
            return (weights / noise.exponential(keys, self._token_ids)).argmax(dim=1)
        if kind == _NARROW:
            return _race(filters.keep(weights, top_k, top_p, min_p, max(self._top_k[slot] for slot in slots)), keys)
        if self._device.type != "cpu":
            return _race(filters.keep(weights, top_k, top_p, min_p, self._vocab_size), keys)
        # On the CPU looking at a result costs no wait, so only the rows that need it are sorted.
        kept = filters.keep(weights, top_k, top_p, min_p, min(_NUCLEUS_WIDTH, self._vocab_size))
        ids = _race(kept, keys)
        wide = kept.complete.logical_not().nonzero()[:, 0]
        if len(wide):
            kept = filters.keep(weights[wide], top_k[wide], top_p[wide], min_p[wide], self._vocab_size)
            ids.index_copy_(0, wide, _race(kept, keys[wide]))
        return ids

    def _logprobs(
        self, logits: Tensor, ids: Tensor, flags: Sequence[int], slots: Sequence[int]
    ) -> list[TokenLogprobs | None]:
        asking = _rows_with(flags, _LOGPROBS)
        (rows,) = self._upload(asking)
        result: list[TokenLogprobs | None] = [None] * len(slots)
        entries = token_logprobs(logits[rows], ids[rows], [self._num_top[slots[row]] for row in asking])
        for row, entry in zip(asking, entries, strict=True):
            result[row] = entry
        return result

    def _upload(self, *lists: Sequence[int]) -> Tensor:
        """Lists of one length as the rows of one int64 tensor on the device, in one copy that does not wait."""
        host = torch.tensor(lists, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)


def _rows_with(flags: Sequence[int], wanted: int) -> list[int]:
    return [row for row, flag in enumerate(flags) if flag & wanted]


def _race(kept: filters.Kept, keys: Tensor) -> Tensor:
    """Draw one of the kept tokens of each row; a dropped one has weight 0 and never wins. keys [R] -> [R] int64."""
    winners = (kept.weights / noise.exponential(keys, kept.ids)).argmax(dim=1, keepdim=True)
    return kept.ids.gather(1, winners)[:, 0]


def _checked(ids: Tensor, largest: Tensor) -> Tensor:
    """-1 for rows that hold NaN or +inf (`max` finds either) or nothing but -inf."""
    return torch.where(largest.isfinite(), ids, -1)
