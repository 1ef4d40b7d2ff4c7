"""The scheduler's view of one request."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from baleen.messages import SamplingParams, ScoredTokens, TokenLogprobs
from baleen.scheduler.prefix_cache import Node


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One request, from `add` to its last token. Counts are tokens unless they say pages.

    The tokens of a running request, with 2 steps in flight:

        | prompt | generated, known | num_pending: sampled in steps in flight |
        |<------ token_ids -------->|
        |<----------------------- num_tokens ------------------------------->|
        |<---------------------- num_computed ------------------------->|  1 |   KV written, or scheduled to be
        |<--- pages[:node.depth] of the tree --->|<-- pages[node.depth:], its own -->|

    token_ids     known ids: prompt, then output
    max_tokens    prompt and output together end here, at the latest
    stop_ids      sampling one of these ends the request
    priority      larger goes first
    arrived       when it came, by the scheduler's clock
    started       when it was admitted first; None before
    deadline      when its time in the queue, then its time to run, is over
    slot          index in the runner's state, -1 when not running
    node          the deepest cached page in use, locked; None when not running
    pages         the page table, in token order; empty when not running
    num_sent      pages of `pages` that the runner knows
    decoding      the whole of token_ids is scheduled: from here on one token per step
    num_pending   results still to come from steps in flight (a prefill that samples nothing has one, too)
    num_cached    tokens found in the prefix cache at the first admission; -1 before
    score_from    the position whose logits give the next prompt logprob that is wanted and not scheduled; none is when
                  that is num_prompt - 1 or more. Kept over a retraction: what is in flight comes
    prompt_logprobs  those that came, until they are sent with the first output
    """

    rid: str
    sampling: SamplingParams
    token_ids: array[int]
    num_prompt: int
    max_tokens: int
    stop_ids: frozenset[int]
    page_size: int
    priority: int = 0
    arrived: float = 0.0
    deadline: float = math.inf

    started: float | None = None
    slot: int = -1
    node: Node | None = None
    pages: list[int] = field(default_factory=list)
    num_sent: int = 0
    num_computed: int = 0
    decoding: bool = False

    num_pending: int = 0
    num_cached: int = -1
    num_retractions: int = 0
    finished: bool = False
    score_from: int = field(init=False)
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False)
    _page_keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = self.sampling.prompt_logprobs
        self.score_from = self.num_prompt if first is None else max(0, first - 1)
        self.prompt_logprobs = [None] if first == 0 else []  # nothing predicts the first token

    @property
    def running(self) -> bool:
        return self.slot >= 0

    @property
    def num_tokens(self) -> int:
        """Known tokens and those sampled in steps in flight."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def kv_limit(self) -> int:
        """The most tokens whose KV is ever needed: the last token sampled needs none."""
        return max(self.num_prompt, self.max_tokens - 1)

    @property
    def decodes_next(self) -> bool:
        """The next row is one decode token. False when the steps in flight sample all that may be sampled."""
        return self.decoding and len(self.token_ids) + self.num_pending < self.max_tokens

    @property
    def max_cached_pages(self) -> int:
        """Whole pages that a prefix hit may cover: what gives logits that are wanted is computed, the last token always
        is."""
        is_scored = self.score_from >= self.num_prompt - 1
        return (len(self.token_ids) - 1 if is_scored else self.score_from) // self.page_size

    @property
    def num_full_pages(self) -> int:
        """Pages whose tokens are all known and computed (or scheduled to be): those that may be shared."""
        return min(self.num_computed, len(self.token_ids)) // self.page_size

    def score(self, start: int, stop: int) -> ScoredTokens | None:
        """The prompt tokens whose logprobs a chunk start..stop-1 is to give, if any; they count as scheduled now."""
        first, end = max(start, self.score_from), min(stop, self.num_prompt - 1)
        if first >= end:
            return None
        self.score_from = end
        return ScoredTokens(first, tuple(self.token_ids[first + 1 : end + 1]))

    def page_keys(self, start: int, stop: int) -> list[bytes]:
        """The prefix cache's keys of pages start..stop-1; all their tokens must be known."""
        for page in range(len(self._page_keys), stop):
            self._page_keys.append(self.token_ids[page * self.page_size : (page + 1) * self.page_size].tobytes())
        return self._page_keys[start:stop]


def stop_ids(sampling: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """With ignore_eos none, but for the eos that says that a grammar's text is complete: nothing may follow it."""
    if sampling.ignore_eos:
        return frozenset() if sampling.grammar is None else eos_token_ids
    return eos_token_ids.union(sampling.stop_token_ids)
