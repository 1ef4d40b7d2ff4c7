"""A runner without a model, and a loop around it, for the scheduler's tests.

`FakeRunner` keeps what a real one keeps: KV per (page, offset), a page table and the last sampled id per slot, all
learned from the rows alone. The "KV" of a token is a hash of the token and of the KV of all tokens before it, read
through the page table; the next token is a hash of all KV of the request, read the same way. So a wrong start, a page
that is missing, stale, shared by mistake or overwritten too early changes the tokens. `tokens_alone` is the same
function over a plain list.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from baleen.messages import (
    GenerateRequest,
    OpenSlot,
    SamplingParams,
    ScheduledBatch,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
    pack_ids,
)
from baleen.scheduler.scheduler import Scheduler

VOCAB = 50
NEVER = 1 << 40  # eos_every: no eos
EOS = 0
NAN_TEMPERATURE = 7.0  # a request with this temperature gets NaN logits after NAN_AFTER tokens
NAN_AFTER = 3
NAN_PROMPT_TEMPERATURE = 8.0  # one with this has NaN logits at the end of its prompt
STALE = -12345  # what is read where nothing was written


def chain(previous: int, token: int) -> int:
    return hash((previous, token, 17))


def choose(kv: list[int], eos_every: int) -> int:
    """The next token: eos about once in `eos_every`."""
    value = hash(tuple(kv))
    return EOS if value % eos_every == 0 else 1 + (value // eos_every) % (VOCAB - 1)


def score(kv: int, token: int) -> TokenLogprobs:
    """The logprob of a prompt's token after a token with that KV."""
    return TokenLogprobs(-float(hash((kv, token)) % 1000))


def prompt_logprobs_alone(prompt: list[int], sampling: SamplingParams) -> tuple[TokenLogprobs | None, ...]:
    """What the first output must carry."""
    first = sampling.prompt_logprobs
    if first is None:
        return ()
    entries: list[TokenLogprobs | None] = [None]
    kv = 0
    for token, following in pairwise(prompt):
        kv = chain(kv, token)
        entries.append(score(kv, following))
    return tuple(entries[first:])


def tokens_alone(
    prompt: list[int], sampling: SamplingParams, context_length: int, eos_every: int
) -> tuple[list[int], str]:
    """What the request must give whatever happens around it: its output ids and finish reason."""
    kv: list[int] = []
    for token in prompt:
        kv.append(chain(kv[-1] if kv else 0, token))
    output: list[int] = []
    stop_ids = set() if sampling.ignore_eos else {EOS, *sampling.stop_token_ids}
    if sampling.temperature == NAN_PROMPT_TEMPERATURE and any(prompt_logprobs_alone(prompt, sampling)):
        return output, "error"
    while len(output) < sampling.max_new_tokens and len(prompt) + len(output) < context_length:
        if sampling.temperature == NAN_TEMPERATURE and len(output) == NAN_AFTER:
            return output, "error"
        output.append(choose(kv, eos_every))
        if output[-1] in stop_ids:
            return output, "stop"
        kv.append(chain(kv[-1], output[-1]))
    return output, "length"


@dataclass
class Slot:
    sampling: SamplingParams
    num_prompt: int
    pages: list[int]
    last_sampled: int = STALE


class FakeRunner:
    def __init__(self, page_size: int, num_slots: int, eos_every: int = VOCAB) -> None:
        self.page_size = page_size
        self.eos_every = eos_every
        self.slots: list[Slot | None] = [None] * num_slots
        self.kv: dict[tuple[int, int], int] = {}
        self.opened: list[OpenSlot] = []
        self.num_scored = 0
        self.num_computed_tokens = 0

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Rows read what earlier steps wrote, never what another row of the same step writes."""
        assert batch.rows
        written: dict[tuple[int, int], int] = {}
        sampled = []
        scored = []
        num_decodes = sum(not row.token_ids for row in batch.rows)
        assert all(not row.token_ids for row in batch.rows[:num_decodes]), "decode rows come first"
        assert len({row.slot for row in batch.rows}) == len(batch.rows), "one row per slot"
        for row in batch.rows:
            if row.open is not None:
                self.opened.append(row.open)
                self.slots[row.slot] = Slot(row.open.sampling, row.open.num_prompt, list(row.open.pages))
            slot = self.slots[row.slot]
            assert slot is not None
            slot.pages += row.new_pages
            places = [divmod(position, self.page_size) for position in range(row.start + row.num_tokens)]
            table = [(slot.pages[index], offset) for index, offset in places]
            history = [self.kv.get(place, STALE) for place in table[: row.start]]
            for place, token in zip(table[row.start :], row.token_ids or (slot.last_sampled,), strict=True):
                assert place[0] != 0, "page 0 is for padding"
                assert place not in written, "two rows write to the same place"
                history.append(chain(history[-1] if history else 0, token))
                written[place] = history[-1]
            self.num_computed_tokens += row.num_tokens
            if row.scored is not None:
                start, end = row.scored.start, row.scored.start + len(row.scored.token_ids)
                assert row.start <= start < end <= row.start + row.num_tokens, "scored positions are the row's own"
                entries = list(map(score, history[start:end], row.scored.token_ids))
                if slot.sampling.temperature == NAN_PROMPT_TEMPERATURE and end == slot.num_prompt - 1:
                    entries[-1] = TokenLogprobs(math.nan)
                scored.append(tuple(entries))
                self.num_scored += len(entries)
            if row.sample:
                is_nan = slot.sampling.temperature == NAN_TEMPERATURE and len(history) == slot.num_prompt + NAN_AFTER
                slot.last_sampled = -1 if is_nan else choose(history, self.eos_every)
                sampled.append(slot.last_sampled)
        self.kv.update(written)
        return StepOutput(batch.step, tuple(sampled), prompt_logprobs=tuple(scored))


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    last: TokenOutput | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    arrived: float = 0.0
    ended: float = 0.0

    @property
    def finish_reason(self) -> str | None:
        return self.last.finish_reason if self.last else None


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Loop:
    """An engine loop. depth 1: schedule, run, update. depth 2: step n+1 is scheduled before the update of n.

    Each step takes a second of `clock`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: FakeRunner,
        depth: int = 1,
        max_step_tokens: int = 1 << 60,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.scheduler, self.runner, self.depth, self.max_step_tokens = scheduler, runner, depth, max_step_tokens
        self.in_flight: deque[StepOutput] = deque()
        self.results: dict[str, Result] = {}
        self.batches: list[ScheduledBatch] = []

    def add(self, rid: str, prompt: list[int], sampling: SamplingParams | None = None, priority: int = 0) -> None:
        self.results[rid] = Result(arrived=self.clock.now)
        message = GenerateRequest(
            rid=rid, input_ids=pack_ids(prompt), sampling=sampling or SamplingParams(), priority=priority
        )
        refusal = self.scheduler.add(message)
        if refusal is not None:
            self._receive([refusal])

    def step(self) -> None:
        self.clock.now += 1
        self._receive(self.scheduler.expire())
        self.scheduler.check_invariants()
        batch = self.scheduler.schedule()
        self.scheduler.check_invariants()
        assert batch is not None or self.in_flight or not self.scheduler.has_work(), "work, but nothing to do"
        if batch is not None:
            assert sum(row.num_tokens for row in batch.rows) <= self.max_step_tokens
            self.batches.append(batch)
            self.in_flight.append(self.runner.execute(batch))
        while len(self.in_flight) >= self.depth or (self.in_flight and batch is None):
            self._receive(self.scheduler.update(self.in_flight.popleft()))
            self.scheduler.check_invariants()

    def finish(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError(f"not finished after {max_steps} steps")

    def _receive(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            result = self.results[output.rid]
            assert result.finish_reason is None, "output after the end"
            assert result.last is None or not output.prompt_logprobs, "prompt logprobs come with the first output"
            result.prompt_logprobs += output.prompt_logprobs
            result.ended = self.clock.now
            result.token_ids += output.token_ids
            result.last = output
            assert output.num_output_tokens == len(result.token_ids)


def make(depth: int = 1, eos_every: int = NEVER, **changes: Any) -> Loop:
    settings: dict[str, Any] = {
        "num_pages": 64,
        "page_size": 4,
        "max_running_requests": 8,
        "chunked_prefill_size": 64,
        "context_length": 1000,
        "eos_token_ids": [EOS],
    }
    settings.update(changes)
    runner = FakeRunner(settings["page_size"], settings["max_running_requests"], eos_every)
    clock = Clock()
    return Loop(Scheduler(clock=clock, **settings), runner, depth, clock=clock)


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 50) for _ in range(length)]


def sampling(max_new_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **changes)
