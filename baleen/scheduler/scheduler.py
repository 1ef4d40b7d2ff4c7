"""The scheduler of one replica: which tokens of which requests the next step computes, and where their KV goes."""

from __future__ import annotations

import heapq
import math
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

from baleen.messages import (
    CacheFlushed,
    EngineStats,
    FinishReason,
    GenerateRequest,
    OpenSlot,
    ScheduledBatch,
    ScheduledRow,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)
from baleen.scheduler.admission import NewTokenRatio, expected_pages
from baleen.scheduler.counters import Counters
from baleen.scheduler.page_pool import PagePool
from baleen.scheduler.policy import POLICIES, by_priority
from baleen.scheduler.request import Request, stop_ids


class InFlightStep(NamedTuple):
    """A step that is scheduled and whose output is still to come.

    Requests, not slots: by the time the output comes, a slot may belong to another request.
    """

    step: int
    sampled: list[Request]  # in row order, as in StepOutput
    prefilled: list[Request]  # end with this step and sample nothing (max_new_tokens is 0)
    scored: list[Request]  # get prompt logprobs, in row order


class Scheduler:
    """Continuous batching with chunked prefill over a paged KV pool with a prefix cache.

    `schedule` may be called again before the outputs of earlier steps have come to `update`; outputs come in step
    order. Then a request's last token is not known yet, its next row says "the last one sampled in this slot", and what
    was computed beyond an eos nobody could foresee is thrown away. Alternating `schedule` and `update` is the same
    thing with nothing in flight.

    Pages and slots of a request that ends are free at once, though a step in flight may still write to them: the runner
    executes steps in order, so whatever a later step writes there, or expects to read, comes after. For the same reason
    pages may be shared as soon as the step that fills them is scheduled, to requests of later steps.

    num_pages                 pages of the pool, without page 0
    chunked_prefill_size      most tokens of one step, all rows together; -1: no limit
    max_running_requests      runner slots
    schedule_policy           a name in POLICIES
    schedule_conservativeness scales the share of the pool kept back for tokens to be generated (admission.py)
    context_length            most tokens of a request, prompt and output
    enable_priority           GenerateRequest.priority says who is admitted first and who is retracted first
    low_priority_values_first the smaller priority is the higher one
    waiting_timeout           seconds in the queue; 0 or less: no limit
    running_timeout           seconds from the first admission, retractions included; 0 or less: no limit
    clock                     seconds
    """

    def __init__(
        self,
        *,
        num_pages: int,
        max_running_requests: int,
        chunked_prefill_size: int,
        context_length: int,
        eos_token_ids: Iterable[int],
        page_size: int = 64,
        schedule_policy: str = "fcfs",
        schedule_conservativeness: float = 1.0,
        disable_radix_cache: bool = False,
        enable_priority: bool = False,
        low_priority_values_first: bool = False,
        waiting_timeout: float = -1.0,
        running_timeout: float = -1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._page_size = page_size
        self._context_length = context_length
        self._eos_token_ids = frozenset(eos_token_ids)
        self._order = by_priority(POLICIES[schedule_policy]) if enable_priority else POLICIES[schedule_policy]
        self._priority_sign = 0 if not enable_priority else -1 if low_priority_values_first else 1
        self._waiting_timeout = waiting_timeout if waiting_timeout > 0 else math.inf
        self._running_timeout = running_timeout if running_timeout > 0 else math.inf
        self._clock = clock
        self._step_tokens = chunked_prefill_size if chunked_prefill_size > 0 else sys.maxsize
        self._num_slots = max_running_requests

        self._pool = PagePool(num_pages, page_size, use_cache=not disable_radix_cache)
        self._new_token_ratio = NewTokenRatio(schedule_conservativeness)

        self._requests: dict[str, Request] = {}  # every request that has not ended
        self._waiting: list[Request] = []  # front first
        self._running: dict[str, Request] = {}  # in order of admission
        self._free_slots = list(range(self._num_slots))  # a heap: low slots first keep the runner's state dense
        self._in_flight: deque[InFlightStep] = deque()

        self._counters = Counters()

    # ---- requests in -------------------------------------------------------------------------------------------------

    def add(self, message: GenerateRequest, arrived: float | None = None) -> TokenOutput | None:
        """Queues a request. One that can never run is answered at once with finish_reason "error", else None.

        arrived  since when it waits, by the scheduler's clock; None: now

        Raises ValueError if a request with this rid has not ended yet.
        """
        if message.rid in self._requests:
            raise ValueError(f"request {message.rid!r} exists already")
        arrived = self._clock() if arrived is None else arrived
        token_ids = array("i")
        token_ids.frombytes(message.input_ids)
        sampling = message.sampling
        request = Request(
            rid=message.rid,
            sampling=sampling,
            token_ids=token_ids,
            num_prompt=len(token_ids),
            max_tokens=min(len(token_ids) + sampling.max_new_tokens, self._context_length),
            stop_ids=stop_ids(sampling, self._eos_token_ids),
            page_size=self._page_size,
            priority=self._priority_sign * message.priority,
            arrived=arrived,
            deadline=arrived + self._waiting_timeout,
        )
        refusal = self._refusal(request)
        if refusal:
            return self._output(request, finish_reason="error", message=refusal)
        self._requests[request.rid] = request
        self._waiting.append(request)
        return None

    def _refusal(self, request: Request) -> str:
        """Why the request can never run, or nothing."""
        max_total_tokens = self._pool.num_pages * self._page_size
        if request.num_prompt > self._context_length:
            return f"the prompt has {request.num_prompt} tokens, more than the context length {self._context_length}"
        if request.kv_limit > max_total_tokens:
            return (
                f"{request.num_prompt} prompt tokens and max_new_tokens={request.sampling.max_new_tokens} do not fit "
                f"the KV pool of max_total_tokens={max_total_tokens}: lower max_new_tokens or raise --max-total-tokens"
            )
        return ""

    def abort(self, rid: str) -> bool:
        """Ends a request without output and frees its pages now. False if there is no such request."""
        request = self._requests.get(rid)
        if request is None:
            return False
        self._end(request)
        self._counters.num_aborted += 1
        return True

    def expire(self) -> list[TokenOutput]:
        """Ends the requests whose time is over and frees their pages now. Call it before each `schedule`.

        One that never ran ends with an error; one that did is aborted and keeps the output it has got.
        """
        if self._waiting_timeout == self._running_timeout == math.inf:
            return []
        now = self._clock()
        outputs = []
        for request in [request for request in self._requests.values() if request.deadline <= now]:
            self._end(request)
            self._counters.num_timeouts += 1
            started = request.started is not None
            name, seconds = ("running", self._running_timeout) if started else ("waiting", self._waiting_timeout)
            message = f"Request {name} timeout reached: --request-{name}-timeout is {seconds:g} seconds."
            outputs.append(
                self._output(request, finish_reason="abort" if started else "error", message=message, status=503)
            )
        return outputs

    def has_work(self) -> bool:
        """A request has not ended or an output is to come. Then `schedule` gives a batch unless a step is in flight."""
        return bool(self._requests or self._in_flight)

    # ---- the next step -----------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step: a decode row for each request that can take one, then prefill chunks up to the token budget.

        The decode rows keep to the budget as well: each of them had a row in the step before.

        None if nothing can be computed before outputs of steps in flight are known.
        """
        self._grow_decoding()
        step = InFlightStep(self._counters.num_steps + 1, [], [], [])
        rows = [self._decode_row(request, step) for request in self._running.values() if request.decodes_next]
        if rows:
            self._new_token_ratio.decay()

        prefilled = []
        budget = self._step_tokens - len(rows)
        for request in [request for request in self._running.values() if not request.decoding]:
            if budget:
                rows.append(self._prefill_row(request, budget, step))
                budget -= rows[-1].num_tokens
                prefilled.append(request)
        if self._waiting and self._free_slots and budget:
            for request, open_slot in self._admit(list(prefilled)):
                rows.append(self._prefill_row(request, budget, step, open_slot))
                budget -= rows[-1].num_tokens
                prefilled.append(request)
                if not budget:
                    break

        if not rows:
            return None
        # After all rows are made: requests of this very step must not read pages that this step fills.
        for request in prefilled:
            self._pool.share_full_pages(request)
        self._counters.num_steps += 1
        self._in_flight.append(step)
        return ScheduledBatch(step.step, tuple(rows))

    def _decode_row(self, request: Request, step: InFlightStep) -> ScheduledRow:
        start = request.num_computed
        request.num_computed = start + 1
        request.num_pending += 1
        step.sampled.append(request)
        return ScheduledRow(slot=request.slot, start=start, new_pages=self._new_pages(request))

    def _prefill_row(
        self, request: Request, budget: int, step: InFlightStep, open_slot: OpenSlot | None = None
    ) -> ScheduledRow:
        """The next chunk of a request's known tokens, as long as the budget allows."""
        start = request.num_computed
        stop = min(start + budget, len(request.token_ids))
        request.num_computed = stop
        request.decoding = stop == len(request.token_ids)
        sample = request.decoding and stop < request.max_tokens
        if request.decoding:
            request.num_pending += 1
            (step.sampled if sample else step.prefilled).append(request)
        scored = request.score(start, stop)
        if scored is not None:
            step.scored.append(request)
        return ScheduledRow(
            slot=request.slot,
            start=start,
            token_ids=tuple(request.token_ids[start:stop]),
            new_pages=self._new_pages(request),
            sample=sample,
            open=open_slot,
            scored=scored,
        )

    def _new_pages(self, request: Request) -> tuple[int, ...]:
        """The pages that the runner does not know yet."""
        if request.num_sent == len(request.pages):
            return ()
        pages = tuple(request.pages[request.num_sent :])
        request.num_sent = len(request.pages)
        return pages

    # ---- admission ---------------------------------------------------------------------------------------------------

    def _admit(self, prefilling: list[Request]) -> Iterator[tuple[Request, OpenSlot]]:
        """Admits waiting requests in the policy's order until one does not fit. The caller stops at the token budget.

        A request fits if its own tokens, prompt and to be generated, fit into the free and evictable pages after the
        growth that is expected of the running ones. So its prompt gets all its pages now and only decode rows can ever
        run out. When nothing runs, the first request always fits: `add` has checked it against the whole pool. Just
        after a retraction none of the same priority does: the one retracted last is first of these, and needs more than
        the pages it had.

        prefilling  the running requests that have a prefill chunk in this step
        """
        if not self._running:
            self._new_token_ratio.reset()
        ratio = self._new_token_ratio.value
        growth = sum(expected_pages(request, ratio) - len(request.pages) for request in self._running.values())
        computing = {self._pool.page_in_work(request) for request in prefilling}
        for request in list(self._order(self._waiting, lambda request: self._pool.match(request).depth)):
            if not self._free_slots or request.num_pending:
                return  # num_pending: retracted with its last token still unknown; it holds the line until that comes
            node = self._pool.match(request)
            depth = node.depth
            if depth < request.max_cached_pages and (node, request.page_keys(depth, depth + 1)[0]) in computing:
                continue  # its next page is being computed for another request: share it in a later step
            if not self._pool.enter(request, node, growth):
                return
            growth += expected_pages(request, ratio) - len(request.pages)
            computing.add(self._pool.page_in_work(request))
            yield request, self._open(request)

    def _open(self, request: Request) -> OpenSlot:
        """Gives a request that has its pages a slot."""
        self._waiting.remove(request)
        self._running[request.rid] = request
        request.slot = heapq.heappop(self._free_slots)
        request.num_sent = request.num_computed // self._page_size
        if request.started is None:
            self._start(request)
        sampling = request.sampling
        return OpenSlot(
            sampling=sampling,
            pages=tuple(request.pages[: request.num_sent]),
            num_prompt=request.num_prompt,
            history=tuple(request.token_ids) if sampling.needs_history else (),
        )

    def _start(self, request: Request) -> None:
        """The first admission."""
        request.started = self._clock()
        request.deadline = request.started + self._running_timeout
        request.num_cached = request.num_computed
        self._counters.admitted(request, request.started - request.arrived)

    # ---- pages -------------------------------------------------------------------------------------------------------

    def _grow_decoding(self) -> None:
        """A page for each decode row that starts one, retracting requests while there is none.

        Of the highest priority, the request with the most output goes last. When it is alone its pages fit (`add` has
        checked) and all others are free or evictable, so it always ends: the scheduler makes progress whatever the
        pressure.
        """
        num_retractions = self._counters.num_retractions
        for request in list(self._running.values()):
            if not request.decodes_next or request.num_computed < len(request.pages) * self._page_size:
                continue
            while request.running and not self._pool.num_available:
                self._retract(min(self._running.values(), key=_retraction_order))
            if request.running:  # it may be the one retracted, for this page or for another's
                self._pool.grow(request)
        if self._counters.num_retractions > num_retractions:
            self._new_token_ratio.after_retraction(self._running.values())

    def _retract(self, request: Request) -> None:
        """Takes slot and pages from a running request and puts it, with all its tokens, at the front of the queue.

        Its full pages go to the tree, where those that are not evicted meanwhile wait for it. Results of steps in
        flight still come to it in `update`, and may end it; it is not admitted before they have come.
        """
        self._release(request)
        self._waiting.insert(0, request)
        request.num_retractions += 1
        self._counters.num_retractions += 1

    def _release(self, request: Request) -> None:
        """Takes slot and pages from a running request."""
        self._pool.leave(request)
        heapq.heappush(self._free_slots, request.slot)
        del self._running[request.rid]
        request.slot, request.decoding = -1, False

    # ---- results -----------------------------------------------------------------------------------------------------

    def update(self, output: StepOutput) -> list[TokenOutput]:
        """Takes the output of the oldest step in flight; returns what it added to each request.

        Raises ValueError if the output is not of that step or has not one entry for each row that asked for one.
        """
        if not self._in_flight or self._in_flight[0].step != output.step:
            raise ValueError(f"output of step {output.step} is not that of the oldest step in flight")
        sampled = self._in_flight[0].sampled
        if len(output.token_ids) != len(sampled) or len(output.logprobs) not in (0, len(sampled)):
            raise ValueError(f"step {output.step} samples {len(sampled)} tokens, not {len(output.token_ids)}")
        scored = self._in_flight[0].scored
        if len(output.prompt_logprobs) != len(scored):
            raise ValueError(f"step {output.step} scores {len(scored)} prompts, not {len(output.prompt_logprobs)}")
        step = self._in_flight.popleft()
        outputs = []
        for request, entries in zip(scored, output.prompt_logprobs):
            request.prompt_logprobs += entries
            if any(math.isnan(entry.logprob) for entry in entries):
                outputs += self._fail(request)
        errors = {error.row: error for error in output.errors}
        rows = zip(sampled, output.token_ids, output.logprobs or repeat(None))
        for row, (request, token_id, logprobs) in enumerate(rows):
            request.num_pending -= 1
            if token_id < 0:
                outputs += self._fail(request)
            elif row in errors and not request.finished:
                self._end(request)
                message, status = errors[row].message, errors[row].status
                outputs.append(self._output(request, finish_reason="error", message=message, status=status))
            elif not request.finished:  # else it ended, or was aborted, when this step was in flight already
                outputs.append(self._append(request, token_id, logprobs))
        for request in step.prefilled:
            request.num_pending -= 1
            if not request.finished:
                self._end(request)
                outputs.append(self._output(request, finish_reason="length"))
        return outputs

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """One sampled token, and what it means for the request."""
        request.token_ids.append(token_id)
        self._counters.num_generated_tokens += 1
        finish_reason: FinishReason | None = None
        if token_id in request.stop_ids:
            finish_reason = "stop"
        elif len(request.token_ids) >= request.max_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            self._end(request)
        return self._output(
            request,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=finish_reason,
            matched=token_id if finish_reason == "stop" else None,
        )

    def _fail(self, request: Request) -> list[TokenOutput]:
        """The request's logits were no numbers: an error, unless it has ended already.

        Its KV may hold NaN, which the next request with this prefix would read: nothing of it stays in the tree.
        """
        outputs = []
        if not request.finished:
            self._end(request)
            message = "the model's logits held NaN or infinity"
            outputs.append(self._output(request, finish_reason="error", message=message))
        self._pool.forget(request)
        return outputs

    def _end(self, request: Request) -> None:
        """Forgets a request, running or waiting."""
        request.finished = True
        del self._requests[request.rid]
        if request.running:
            self._release(request)
        else:
            self._waiting.remove(request)

    def _output(
        self,
        request: Request,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        finish_reason: FinishReason | None = None,
        matched: int | None = None,
        message: str = "",
        status: int = 500,
    ) -> TokenOutput:
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        if request.prompt_logprobs and finish_reason not in ("error", "abort"):
            prompt_logprobs, request.prompt_logprobs = tuple(request.prompt_logprobs), []
        return TokenOutput(
            rid=request.rid,
            token_ids=token_ids,
            num_prompt_tokens=request.num_prompt,
            num_cached_tokens=max(0, request.num_cached),
            num_output_tokens=request.num_output,
            logprobs=logprobs,
            finish_reason=finish_reason,
            matched=matched,
            message=message,
            status=status,
            prompt_logprobs=prompt_logprobs,
        )

    # ---- from outside ------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        return self._counters.stats(self._waiting, self._running.values(), self._pool)

    def flush_cache(self) -> CacheFlushed:
        """Empties the prefix cache; refused while requests run, since they use its pages."""
        if self._running:
            return CacheFlushed(ok=False, message=f"{len(self._running)} requests are running")
        self._pool.flush()
        return CacheFlushed(ok=True)

    def check_invariants(self) -> None:
        """Recounts who owns what, in O(pages). Raises AssertionError if a page or slot is lost or owned twice."""
        running = list(self._running.values())
        self._pool.check(running)
        slots = sorted(self._free_slots + [request.slot for request in running])
        assert slots == list(range(self._num_slots)), "a runner slot is lost or has two owners"
        assert all(not request.running and request.node is None and not request.pages for request in self._waiting)
        assert len(self._requests) == len(running) + len(self._waiting)


def _retraction_order(request: Request) -> tuple[int, int, int]:
    """The smallest is retracted first: the lowest priority, of these the least output lost, then the most pages won."""
    return request.priority, request.num_output, -request.num_prompt
