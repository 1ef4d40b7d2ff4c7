from __future__ import annotations

from array import array

import pytest

from baleen.messages import SamplingParams
from baleen.scheduler.policy import LPM_MAX_WAITING, POLICIES, fcfs, lpm
from baleen.scheduler.request import Request


def make(rid: str, num_retractions: int = 0) -> Request:
    return Request(
        rid=rid,
        sampling=SamplingParams(),
        token_ids=array("i", [1, 2, 3]),
        num_prompt=3,
        max_tokens=10,
        stop_ids=frozenset(),
        page_size=64,
        num_retractions=num_retractions,
    )


def rids(requests: object) -> str:
    return "".join(request.rid for request in requests)  # type: ignore[attr-defined]


MATCHED = {"a": 0, "b": 3, "c": 1, "d": 3}


def test_fcfs_keeps_the_order() -> None:
    assert rids(fcfs([make(rid) for rid in "abcd"], lambda request: MATCHED[request.rid])) == "abcd"


def test_lpm_takes_the_longest_match_first_and_ties_in_order_of_arrival() -> None:
    assert rids(lpm([make(rid) for rid in "abcd"], lambda request: MATCHED[request.rid])) == "bdca"


def test_lpm_puts_retracted_requests_first() -> None:
    assert rids(lpm([make("a", 1), make("b"), make("c")], lambda request: MATCHED[request.rid])) == "abc"


def test_lpm_is_fcfs_beyond_its_limit() -> None:
    matched = dict.fromkeys("b", 5)
    at_limit = [make("a")] * (LPM_MAX_WAITING - 1) + [make("b")]
    assert rids(lpm(at_limit, lambda request: matched.get(request.rid, 0)))[0] == "b"
    beyond = [make("a")] * LPM_MAX_WAITING + [make("b")]
    assert rids(lpm(beyond, lambda request: matched.get(request.rid, 0)))[0] == "a"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_returns_each_request_once(name: str) -> None:
    waiting = [make(rid, num_retractions=rid == "c") for rid in "abcd"]
    ordered = POLICIES[name](waiting, lambda request: MATCHED[request.rid])
    assert sorted(rids(ordered)) == list("abcd")
    assert rids(waiting) == "abcd", "the queue itself is not reordered"
