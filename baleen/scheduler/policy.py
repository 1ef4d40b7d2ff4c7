"""In which order waiting requests are tried. The scheduler admits from the front until one does not fit.

A policy is a pure function of the queue (front first) and of the number of pages each request would find in the prefix
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baleen.scheduler.request import Request

Policy = Callable[[Sequence[Request], Callable[[Request], int]], Sequence[Request]]

LPM_MAX_WAITING = 128


def fcfs(waiting: Sequence[Request], num_matched_pages: Callable[[Request], int]) -> Sequence[Request]:
    """First come, first served. Never starves: what does not fit holds the line until it does."""
    return waiting


def lpm(waiting: Sequence[Request], num_matched_pages: Callable[[Request], int]) -> Sequence[Request]:
    """Longest prefix match first, then first come. What is cached is used before it is evicted.

    A request without a hit can wait as long as requests with one keep coming. Retracted requests go first whatever
    their match, because someone is already reading their output. Beyond LPM_MAX_WAITING requests matching them all
    costs too much: then fcfs.
    """
    if len(waiting) > LPM_MAX_WAITING:
        return fcfs(waiting, num_matched_pages)
    return sorted(waiting, key=lambda request: (request.num_retractions == 0, -num_matched_pages(request)))


def by_priority(policy: Policy) -> Policy:
    """Larger `Request.priority` first, equal ones as `policy` has them. Small ones may wait for ever."""

    def order(waiting: Sequence[Request], num_matched_pages: Callable[[Request], int]) -> Sequence[Request]:
        return sorted(policy(waiting, num_matched_pages), key=lambda request: -request.priority)

    return order


# "priority" is fcfs: flags turn priorities on with it, and then `by_priority` goes around every policy.
POLICIES: dict[str, Policy] = {"fcfs": fcfs, "lpm": lpm, "priority": fcfs}
