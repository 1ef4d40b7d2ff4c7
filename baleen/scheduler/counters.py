"""What the scheduler counts, and what it reports."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field

from baleen.messages import QUEUE_SECONDS, EngineStats
from baleen.scheduler.page_pool import PagePool
from baleen.scheduler.request import Request


@dataclass(slots=True)
class Counters:
    """Totals since the start; `EngineStats` says what each is."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_retractions: int = 0
    num_aborted: int = 0
    num_timeouts: int = 0
    queue_seconds: float = 0.0
    queue_counts: list[int] = field(default_factory=lambda: [0] * (len(QUEUE_SECONDS) + 1))

    def admitted(self, request: Request, seconds: float) -> None:
        """A request is admitted for the first time after so long in the queue."""
        self.num_prompt_tokens += request.num_prompt
        self.num_cached_tokens += request.num_cached
        self.queue_seconds += seconds
        self.queue_counts[bisect_left(QUEUE_SECONDS, seconds)] += 1

    def stats(self, waiting: Collection[Request], running: Collection[Request], pool: PagePool) -> EngineStats:
        return EngineStats(
            num_running=len(running),
            num_waiting=len(waiting),
            num_waiting_tokens=sum(len(request.token_ids) for request in waiting),
            num_retracted=sum(request.num_retractions > 0 for request in waiting),
            num_decoding_tokens=sum(len(request.token_ids) for request in running if request.decoding),
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_cached_pages=pool.num_cached,
            num_evictable_pages=pool.num_evictable,
            num_evicted_pages_total=pool.num_evicted,
            num_steps_total=self.num_steps,
            num_prompt_tokens_total=self.num_prompt_tokens,
            num_cached_tokens_total=self.num_cached_tokens,
            num_generated_tokens_total=self.num_generated_tokens,
            num_retractions_total=self.num_retractions,
            num_aborted_total=self.num_aborted,
            num_timeouts_total=self.num_timeouts,
            queue_seconds_total=self.queue_seconds,
            queue_counts_total=tuple(self.queue_counts),
        )
