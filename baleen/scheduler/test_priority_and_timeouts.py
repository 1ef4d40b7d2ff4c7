"""Who goes first, who goes when pages run out, and when waiting or running has lasted too long."""

from __future__ import annotations

import pytest

from baleen.messages import QUEUE_SECONDS, GenerateRequest, pack_ids
from baleen.scheduler.conftest import NAN_AFTER, NAN_TEMPERATURE, Loop, make, prompt, sampling, tokens_alone


def ended(loop: Loop) -> str:
    """The rids in the order in which they end."""
    order: list[str] = []
    while loop.scheduler.has_work():
        loop.step()
        order += [rid for rid, result in loop.results.items() if result.finish_reason and rid not in order]
    return "".join(order)


# ---- priority --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "abcde"),
        ({"enable_priority": True}, "cebad"),
        ({"enable_priority": True, "low_priority_values_first": True}, "dabce"),
    ],
)
def test_waiting_requests_go_by_priority_then_arrival(flags: dict[str, bool], expected: str) -> None:
    loop = make(max_running_requests=1, **flags)
    for rid, priority in zip("abcde", (1, 2, 7, 0, 7), strict=True):
        loop.add(rid, prompt(ord(rid), 5), sampling(2), priority)
    assert ended(loop) == expected


def test_a_running_request_is_not_stopped_for_a_higher_priority() -> None:
    loop = make(max_running_requests=1, enable_priority=True)
    loop.add("a", prompt(1, 5), sampling(6), 0)
    loop.step()
    loop.add("b", prompt(2, 5), sampling(2), 9)
    assert ended(loop) == "ab"
    assert loop.scheduler.stats().num_retractions_total == 0


def test_equal_priorities_go_as_the_policy_says() -> None:
    loop = make(max_running_requests=1, enable_priority=True, schedule_policy="lpm")
    loop.add("w", prompt(1, 20), sampling(1))
    loop.finish()
    for rid, seed, priority in (("a", 2, 1), ("b", 1, 1), ("c", 1, 0), ("d", 3, 5)):
        loop.add(rid, prompt(seed, 20), sampling(1), priority)
    assert ended(loop).removeprefix("w") == "dbac"


@pytest.mark.parametrize(("enable_priority", "expected"), [(False, "short"), (True, "low")])
def test_retracts_the_lowest_priority_first(enable_priority: bool, expected: str) -> None:
    loop = make(num_pages=12, schedule_conservativeness=0.0, enable_priority=enable_priority)
    loop.add("low", prompt(1, 6), sampling(30), 0)
    loop.step()
    loop.step()
    loop.add("short", prompt(2, 6), sampling(30), 5)
    while not loop.scheduler.stats().num_retractions_total:
        loop.step()
    assert [request.rid for request in loop.scheduler._waiting] == [expected]
    stats = loop.scheduler.stats()
    assert (stats.num_retracted, stats.num_waiting) == (1, 1)
    loop.finish()
    for rid, seed in (("low", 1), ("short", 2)):
        assert loop.results[rid].token_ids == tokens_alone(prompt(seed, 6), sampling(30), 1000, 1 << 40)[0]


# ---- timeouts --------------------------------------------------------------------------------------------------------


def test_waiting_too_long_is_an_error_without_tokens() -> None:
    loop = make(max_running_requests=1, waiting_timeout=10.0)
    loop.add("a", prompt(1, 5), sampling(30))
    loop.add("b", prompt(2, 5), sampling(30))
    loop.step()
    loop.add("later", prompt(3, 5), sampling(2))
    for _ in range(8):
        loop.step()
    assert loop.results["b"].last is None
    loop.step()
    last = loop.results["b"].last
    assert last is not None
    assert (last.finish_reason, last.status, last.token_ids) == ("error", 503, ())
    assert last.message == "Request waiting timeout reached: --request-waiting-timeout is 10 seconds."
    loop.step()
    assert loop.results["later"].finish_reason == "error"
    loop.finish()
    assert len(loop.results["a"].token_ids) == 30, "running is not waiting"
    assert loop.scheduler.stats().num_timeouts_total == 2
    assert loop.scheduler.stats().num_aborted_total == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_running_too_long_is_an_abort_with_the_tokens_so_far(depth: int) -> None:
    loop = make(depth, running_timeout=6.0, disable_radix_cache=True)
    loop.clock.now = 1000.0
    loop.add("a", prompt(1, 5), sampling(30))
    loop.add("short", prompt(2, 5), sampling(3))
    for _ in range(7):
        loop.step()
    result = loop.results["a"]
    assert result.last is not None
    assert (result.finish_reason, result.last.status) == ("abort", 503)
    assert "--request-running-timeout is 6 seconds" in result.last.message
    assert len(result.token_ids) == 7 - depth
    assert result.token_ids == tokens_alone(prompt(1, 5), sampling(30), 1000, 1 << 40)[0][: len(result.token_ids)]
    assert loop.scheduler.stats().num_free_pages == 64
    loop.finish()
    assert loop.results["short"].finish_reason == "length"


def test_a_retracted_request_runs_on_by_the_clock() -> None:
    """In the queue again it has output already: its time to wait is over, its time to run goes on."""
    loop = make(num_pages=16, schedule_conservativeness=0.0, waiting_timeout=3.0, running_timeout=35.0)
    loop.add("a", prompt(1, 5), sampling(40))
    loop.step()
    loop.add("b", prompt(2, 5), sampling(40))
    while not loop.scheduler.stats().num_retractions_total:
        loop.step()
    retracted_at = loop.clock.now
    while not loop.results["b"].finish_reason:
        loop.step()
    assert loop.results["b"].ended > retracted_at + 3
    assert loop.results["b"].ended - 2 == 35, "admitted in the second step"
    assert loop.results["b"].finish_reason == "abort"
    assert loop.results["b"].token_ids
    loop.finish()


def test_time_before_the_queue_counts_as_waiting() -> None:
    loop = make(waiting_timeout=5.0)
    loop.clock.now = 100.0
    loop.add("unused", prompt(1, 5), sampling(1))
    message = GenerateRequest(rid="a", input_ids=pack_ids([1, 2]), sampling=sampling(1))
    loop.scheduler.add(message, arrived=95.0)
    assert [output.rid for output in loop.scheduler.expire()] == ["a"]


def test_without_timeouts_nothing_expires() -> None:
    loop = make(max_running_requests=1)
    for rid in "ab":
        loop.add(rid, prompt(1, 5), sampling(3))
    loop.step()
    loop.clock.now = 1e9
    assert loop.scheduler.expire() == []


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_stats_of_queue_and_lengths() -> None:
    loop = make(max_running_requests=2, num_pages=20)
    loop.add("a", prompt(1, 10), sampling(4))
    loop.add("b", prompt(2, 7), sampling(4))
    loop.add("c", prompt(3, 5), sampling(4))
    loop.step()
    stats = loop.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (2, 1, 5)
    assert stats.num_decoding_tokens == 10 + 7 + 2
    assert (sum(stats.queue_counts_total), stats.queue_seconds_total) == (2, 2.0)
    assert stats.queue_counts_total[QUEUE_SECONDS.index(1)] == 2, "a bound belongs to its own bucket"
    loop.clock.now += 5000
    loop.finish()
    stats = loop.scheduler.stats()
    assert stats.queue_counts_total[-1] == 1
    assert stats.queue_seconds_total == 2.0 + 5000 + 5
    assert (stats.num_waiting_tokens, stats.num_decoding_tokens, stats.num_evicted_pages_total) == (0, 0, 0)
    loop.add("big", prompt(4, 70), sampling(1))
    loop.finish()
    assert loop.scheduler.stats().num_evicted_pages_total == 18 - stats.num_free_pages


# ---- bad logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [NAN_AFTER, NAN_AFTER - 1])
def test_pages_of_an_aborted_request_go_when_its_step_in_flight_brings_nan(num_steps: int) -> None:
    loop = make(depth=2)
    loop.add("nan", prompt(1, 10), sampling(20, temperature=NAN_TEMPERATURE))
    for _ in range(num_steps + 1):
        loop.step()
    assert not loop.results["nan"].finish_reason
    loop.scheduler.abort("nan")
    assert loop.scheduler.stats().num_cached_pages > 0
    loop.finish()
    is_nan = num_steps == NAN_AFTER
    assert (loop.scheduler.stats().num_cached_pages == 0) == is_nan
    assert loop.scheduler.stats().num_free_pages + loop.scheduler.stats().num_cached_pages == 64
