"""The scheduler of one replica: which tokens of which requests the next step computes, and where their KV goes."""

from __future__ import annotations

import heapq
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
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
from baleen.scheduler.page_allocator import PageAllocator
from baleen.scheduler.policy import POLICIES
from baleen.scheduler.prefix_cache import Node, PrefixCache
from baleen.scheduler.request import Request


class InFlightStep(NamedTuple):
    """A step that is scheduled and whose output is still to come.

    Requests, not slots: by the time the output comes, a slot may belong to another request.
    """

    step: int
    sampled: list[Request]  # in row order, as in StepOutput
    prefilled: list[Request]  # end with this step and sample nothing (max_new_tokens is 0)


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
    ) -> None:
        self._page_size = page_size
        self._context_length = context_length
        self._eos_token_ids = frozenset(eos_token_ids)
        self._order = POLICIES[schedule_policy]
        self._use_cache = not disable_radix_cache
        self._step_tokens = chunked_prefill_size if chunked_prefill_size > 0 else sys.maxsize
        self._num_slots = max_running_requests

        self._allocator = PageAllocator(num_pages)
        self._cache = PrefixCache()
        self._new_token_ratio = NewTokenRatio(schedule_conservativeness)

        self._requests: dict[str, Request] = {}  # every request that has not ended
        self._waiting: list[Request] = []  # front first
        self._running: dict[str, Request] = {}  # in order of admission
        self._free_slots = list(range(self._num_slots))  # a heap: low slots first keep the runner's state dense
        self._in_flight: deque[InFlightStep] = deque()

        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_retractions = 0
        self._num_aborted = 0

    # ---- requests in -------------------------------------------------------------------------------------------------

    def add(self, message: GenerateRequest) -> TokenOutput | None:
        """Queues a request. One that can never run is answered at once with finish_reason "error", else None.

        Raises ValueError if a request with this rid has not ended yet.
        """
        if message.rid in self._requests:
            raise ValueError(f"request {message.rid!r} exists already")
        token_ids = array("i")
        token_ids.frombytes(message.input_ids)
        sampling = message.sampling
        request = Request(
            rid=message.rid,
            sampling=sampling,
            token_ids=token_ids,
            num_prompt=len(token_ids),
            max_tokens=min(len(token_ids) + sampling.max_new_tokens, self._context_length),
            stop_ids=frozenset() if sampling.ignore_eos else self._eos_token_ids.union(sampling.stop_token_ids),
            page_size=self._page_size,
        )
        refusal = self._refusal(request)
        if refusal:
            return self._output(request, finish_reason="error", message=refusal)
        self._requests[request.rid] = request
        self._waiting.append(request)
        return None

    def _refusal(self, request: Request) -> str:
        """Why the request can never run, or nothing."""
        max_total_tokens = self._allocator.num_pages * self._page_size
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
        self._num_aborted += 1
        return True

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
        step = InFlightStep(self._num_steps + 1, [], [])
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
            self._share_full_pages(request)
        self._num_steps += 1
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
        return ScheduledRow(
            slot=request.slot,
            start=start,
            token_ids=tuple(request.token_ids[start:stop]),
            new_pages=self._new_pages(request),
            sample=sample,
            open=open_slot,
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
        after a retraction none does: the one retracted last is first, and needs more than the pages it had.

        prefilling  the running requests that have a prefill chunk in this step
        """
        if not self._running:
            self._new_token_ratio.reset()
        ratio = self._new_token_ratio.value
        growth = sum(expected_pages(request, ratio) - len(request.pages) for request in self._running.values())
        computing = {self._page_in_work(request) for request in prefilling}
        for request in list(self._order(self._waiting, lambda request: self._match(request).depth)):
            if not self._free_slots or request.num_pending:
                return  # num_pending: retracted with its last token still unknown; it holds the line until that comes
            node = self._match(request)
            depth = node.depth
            if depth < request.max_cached_pages and (node, request.page_keys(depth, depth + 1)[0]) in computing:
                continue  # its next page is being computed for another request: share it in a later step
            self._cache.lock(node)
            num_available = self._allocator.num_free + self._cache.num_evictable - growth
            if expected_pages(request, 1.0) - depth > num_available:
                self._cache.unlock(node)
                return
            open_slot = self._open(request, node)
            growth += expected_pages(request, ratio) - len(request.pages)
            computing.add(self._page_in_work(request))
            yield request, open_slot

    def _match(self, request: Request) -> Node:
        """The longest cached prefix that the request may use: the root, when nothing is ever put in the tree."""
        return self._cache.match(request.page_keys(0, request.max_cached_pages))

    def _page_in_work(self, request: Request) -> tuple[Node, bytes] | None:
        """The parent and key a prefilling request's next page will have in the tree; None if it will not go there."""
        node = request.node
        if node is None or not self._use_cache or (node.depth + 1) * self._page_size > len(request.token_ids):
            return None
        return node, request.page_keys(node.depth, node.depth + 1)[0]

    def _open(self, request: Request, node: Node) -> OpenSlot:
        """Gives a waiting request a slot, the cached prefix up to the locked `node`, and pages for its known tokens."""
        self._waiting.remove(request)
        self._running[request.rid] = request
        request.slot = heapq.heappop(self._free_slots)
        request.node = node
        cached = self._cache.pages(node)
        num_pages = -(-len(request.token_ids) // self._page_size)
        request.pages = cached + self._take_pages(num_pages - len(cached))
        request.num_sent = len(cached)
        request.num_computed = node.depth * self._page_size
        if request.num_cached < 0:
            request.num_cached = request.num_computed
            self._num_cached_tokens += request.num_cached
            self._num_prompt_tokens += request.num_prompt
        sampling = request.sampling
        return OpenSlot(
            sampling=sampling,
            pages=tuple(cached),
            num_prompt=request.num_prompt,
            history=tuple(request.token_ids) if sampling.needs_history else (),
        )

    # ---- pages -------------------------------------------------------------------------------------------------------

    def _take_pages(self, count: int) -> list[int]:
        """Free pages, made by eviction if need be. The caller has checked that there are enough of both."""
        missing = count - self._allocator.num_free
        if missing > 0:
            self._allocator.free(self._cache.evict(missing))
        return self._allocator.take(count)

    def _grow_decoding(self) -> None:
        """A page for each decode row that starts one, retracting requests while there is none.

        The request with the most output goes last. When it is alone its pages fit (`add` has checked) and all others
        are free or evictable, so it always ends: the scheduler makes progress whatever the pressure.
        """
        num_retractions = self._num_retractions
        for request in list(self._running.values()):
            if not request.decodes_next or request.num_computed < len(request.pages) * self._page_size:
                continue
            while request.running and not self._allocator.num_free and not self._cache.num_evictable:
                self._retract(min(self._running.values(), key=lambda other: (other.num_output, -other.num_prompt)))
            if request.running:  # it may be the one retracted, for this page or for another's
                request.pages += self._take_pages(1)
        if self._num_retractions > num_retractions:
            self._new_token_ratio.after_retraction(self._running.values())

    def _retract(self, request: Request) -> None:
        """Takes slot and pages from a running request and puts it, with all its tokens, at the front of the queue.

        Its full pages go to the tree, where those that are not evicted meanwhile wait for it. Results of steps in
        flight still come to it in `update`, and may end it; it is not admitted before they have come.
        """
        self._release(request)
        self._waiting.insert(0, request)
        request.num_retractions += 1
        self._num_retractions += 1

    def _share_full_pages(self, request: Request) -> None:
        """Puts the pages that a prefill chunk has filled into the tree; the request goes on using them."""
        node = request.node
        assert node is not None
        stop = request.num_full_pages
        if self._use_cache and stop > node.depth:
            request.node = self._cache.extend(
                node, request.page_keys(node.depth, stop), request.pages[node.depth : stop]
            )

    def _release(self, request: Request) -> None:
        """Takes slot and pages from a running request. Its full pages stay in the tree, the rest is free at once."""
        node, pages = request.node, request.pages
        assert node is not None
        stop = request.num_full_pages if self._use_cache else node.depth
        duplicates = self._cache.absorb(node, request.page_keys(node.depth, stop), pages[node.depth : stop])
        self._allocator.free(duplicates)
        self._allocator.free(pages[stop:])
        heapq.heappush(self._free_slots, request.slot)
        del self._running[request.rid]
        request.slot, request.node, request.pages, request.decoding = -1, None, [], False

    # ---- results -----------------------------------------------------------------------------------------------------

    def update(self, output: StepOutput) -> list[TokenOutput]:
        """Takes the output of the oldest step in flight; returns what it added to each request.

        Raises ValueError if the output is not of that step or has not one token for each row that samples.
        """
        if not self._in_flight or self._in_flight[0].step != output.step:
            raise ValueError(f"output of step {output.step} is not that of the oldest step in flight")
        sampled = self._in_flight[0].sampled
        if len(output.token_ids) != len(sampled) or len(output.logprobs) not in (0, len(sampled)):
            raise ValueError(f"step {output.step} samples {len(sampled)} tokens, not {len(output.token_ids)}")
        step = self._in_flight.popleft()
        outputs = []
        for request, token_id, logprobs in zip(sampled, output.token_ids, output.logprobs or repeat(None)):
            request.num_pending -= 1
            if not request.finished:  # else it ended, or was aborted, when this step was in flight already
                outputs.append(self._append(request, token_id, logprobs))
        for request in step.prefilled:
            request.num_pending -= 1
            if not request.finished:
                self._end(request)
                outputs.append(self._output(request, finish_reason="length"))
        return outputs

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """One sampled token, and what it means for the request."""
        if token_id < 0:
            self._end(request)
            # Its KV may hold NaN, which the next request with this prefix would read: nothing of it stays in the tree.
            full_pages = len(request.token_ids) // self._page_size
            self._allocator.free(self._cache.drop(self._cache.match(request.page_keys(0, full_pages))))
            return self._output(request, finish_reason="error", message="the model's logits held NaN or infinity")
        request.token_ids.append(token_id)
        self._num_generated_tokens += 1
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
    ) -> TokenOutput:
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
        )

    # ---- from outside ------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages=self._allocator.num_pages,
            num_free_pages=self._allocator.num_free,
            num_cached_pages=self._cache.num_pages,
            num_evictable_pages=self._cache.num_evictable,
            num_steps_total=self._num_steps,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_cached_tokens_total=self._num_cached_tokens,
            num_generated_tokens_total=self._num_generated_tokens,
            num_retractions_total=self._num_retractions,
            num_aborted_total=self._num_aborted,
        )

    def flush_cache(self) -> CacheFlushed:
        """Empties the prefix cache; refused while requests run, since they use its pages."""
        if self._running:
            return CacheFlushed(ok=False, message=f"{len(self._running)} requests are running")
        self._allocator.free(self._cache.flush())
        return CacheFlushed(ok=True)

    def check_invariants(self) -> None:
        """Recounts who owns what, in O(pages). Raises AssertionError if a page is lost or owned twice."""
        running = list(self._running.values())
        nodes = [request.node for request in running if request.node is not None]
        assert len(nodes) == len(running)
        cached = self._cache.check(nodes)
        free = self._allocator.free_pages()
        private = [page for request, node in zip(running, nodes) for page in request.pages[node.depth :]]
        owned = sorted(free + cached + private)
        assert owned == list(range(1, self._allocator.num_pages + 1)), "a page is lost or has two owners"
        for request, node in zip(running, nodes):
            assert request.pages[: node.depth] == self._cache.pages(node), f"{request.rid}: page table and tree differ"
            assert request.num_computed <= len(request.pages) * self._page_size, f"{request.rid}: page missing"
            assert request.num_sent <= len(request.pages)
        slots = sorted(self._free_slots + [request.slot for request in running])
        assert slots == list(range(self._num_slots)), "a runner slot is lost or has two owners"
        assert all(not request.running and request.node is None and not request.pages for request in self._waiting)
        assert len(self._requests) == len(running) + len(self._waiting)
