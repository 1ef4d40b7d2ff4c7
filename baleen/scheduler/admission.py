"""How many pages to keep back for tokens that are not generated yet.

A request may generate `max_new_tokens`, and most generate fewer. Keeping back the maximum for all leaves the pool half
empty; keeping back nothing retracts too often. So each running request is expected to generate a share of what it still
may, the new token ratio. It starts high, falls while all goes well, and is set from what was seen whenever a request
had to be retracted.
"""

from __future__ import annotations

from collections.abc import Collection

from baleen.scheduler.request import Request

INITIAL_RATIO = 0.7
FLOOR_OF_INITIAL = 0.14  # the ratio falls to this share of its start
STEPS_TO_FLOOR = 600
# After a retraction, the running requests are expected to go on for this many tokens each, beyond the share generated
# so far.
TOKENS_PER_REQUEST_AFTER_RETRACTION = 20
# max_new_tokens is often set to "as much as possible": no more than this is kept back for one request.
MAX_TOKENS_EXPECTED = 4096


class NewTokenRatio:
    """`value`: the expected share of the tokens that running requests may still generate, 0..1."""

    def __init__(self, conservativeness: float) -> None:
        self._initial = min(INITIAL_RATIO * conservativeness, 1.0)
        self._floor = self._initial * FLOOR_OF_INITIAL
        self.value = self._initial

    def reset(self) -> None:
        """The engine is idle: what was learned is about requests that are gone."""
        self.value = self._initial

    def decay(self) -> None:
        """A decode step went well."""
        self.value = max(self._floor, self.value - (self._initial - self._floor) / STEPS_TO_FLOOR)

    def after_retraction(self, running: Collection[Request]) -> None:
        """Pages ran out; `running` are those that stay."""
        generated = sum(request.num_output for request in running)
        allowed = sum(request.max_tokens - request.num_prompt for request in running)
        expected = generated + TOKENS_PER_REQUEST_AFTER_RETRACTION * len(running)
        self.value = max(self._floor, min(1.0, expected / (allowed + 1)))


def expected_pages(request: Request, ratio: float) -> int:
    """Pages the request holds when it ends, cached prefix included, if it generates `ratio` of what it still may."""
    remaining = max(0, request.kv_limit - request.num_tokens)
    num_tokens = min(request.num_tokens, request.kv_limit) + int(min(remaining, MAX_TOKENS_EXPECTED) * ratio)
    return -(-num_tokens // request.page_size)
