"""Whatever comes when, each request gets the tokens it gets alone, and no page is lost or shared by mistake."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from baleen.messages import SamplingParams
from baleen.scheduler.conftest import (
    EOS,
    NAN_PROMPT_TEMPERATURE,
    NAN_TEMPERATURE,
    Clock,
    FakeRunner,
    Loop,
    prompt_logprobs_alone,
    tokens_alone,
)
from baleen.scheduler.policy import POLICIES
from baleen.scheduler.scheduler import Scheduler

# Prompts are a prefix of one of these, then a few tokens of a small alphabet: many share pages, many differ in the last
# one.
BASES = [[1 + (7 * i * (base + 1)) % 40 for i in range(40)] for base in range(3)]

sampling_params = st.builds(
    SamplingParams,
    max_new_tokens=st.sampled_from([24, 28, 20, 20, 13, 8, 3, 1, 0]),
    temperature=st.sampled_from([1.0] * 9 + [NAN_TEMPERATURE, NAN_PROMPT_TEMPERATURE]),
    prompt_logprobs=st.sampled_from([None, None, None, 0, 1, 5, 9, 14]),
    stop_token_ids=st.sampled_from([(), (), (3, 4)]),
    ignore_eos=st.sampled_from([True, True, False]),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
)
priorities = st.integers(-1, 1)
tails = st.lists(st.integers(1, 3), min_size=1, max_size=6)
prompts = st.tuples(
    st.just("prompt"), st.integers(0, len(BASES) - 1), st.integers(0, 20), tails, sampling_params, priorities
)
# An earlier request and what it has generated so far, then more.
turns = st.tuples(st.just("turn"), st.integers(0, 30), tails, sampling_params, priorities)
steps = st.tuples(st.just("step"), st.integers(1, 8))
aborts = st.tuples(st.just("abort"), st.integers(0, 30))
scripts = st.lists(
    st.one_of(prompts, prompts, prompts, prompts, turns, turns, steps, steps, aborts), min_size=12, max_size=40
)

scheduler_settings = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([4, 2, 8]),
        "max_running_requests": st.sampled_from([6, 8, 5, 4, 3, 1]),
        "chunked_prefill_size": st.sampled_from([32, 16, 13, 9, 100, -1, 7, 5, 1]),
        "schedule_policy": st.sampled_from(sorted(POLICIES)),
        "schedule_conservativeness": st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0]),
        "disable_radix_cache": st.sampled_from([False, False, True]),
        "context_length": st.sampled_from([200, 40]),
        "enable_priority": st.booleans(),
        "low_priority_values_first": st.booleans(),
        "waiting_timeout": st.sampled_from([-1.0, -1.0, -1.0, 60.0, 4.0]),
        "running_timeout": st.sampled_from([-1.0, -1.0, -1.0, 60.0, 4.0]),
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(
    changes=scheduler_settings,
    pool_tokens=st.sampled_from([48, 56, 64, 64, 80, 120, 300]),
    depth=st.sampled_from([2, 1, 3]),
    eos_every=st.sampled_from([1 << 40, 20, 5]),
    script=scripts,
)
def test_each_request_gets_the_tokens_it_gets_alone(
    changes: dict[str, Any], pool_tokens: int, depth: int, eos_every: int, script: list[tuple[Any, ...]]
) -> None:
    num_pages = pool_tokens // changes["page_size"]
    clock = Clock()
    scheduler = Scheduler(eos_token_ids=[EOS], num_pages=num_pages, clock=clock, **changes)
    step_tokens = changes["chunked_prefill_size"]
    runner = FakeRunner(changes["page_size"], changes["max_running_requests"], eos_every)
    loop = Loop(scheduler, runner, depth, step_tokens if step_tokens > 0 else 1 << 60, clock)
    requests: dict[str, tuple[list[int], SamplingParams]] = {}
    aborted = set()

    def add(prompt: list[int], sampling: SamplingParams, priority: int) -> None:
        rid = f"r{len(requests)}"
        requests[rid] = (prompt, sampling)
        loop.add(rid, prompt, sampling, priority)
        scheduler.check_invariants()

    for operation in script:
        match operation:
            case ("prompt", base, length, tail, sampling, priority):
                add(BASES[base][:length] + tail, sampling, priority)
            case ("turn", index, tail, sampling, priority) if requests:
                rid = f"r{index % len(requests)}"
                add(requests[rid][0] + loop.results[rid].token_ids + tail, sampling, priority)
            case ("abort", index) if requests:
                rid = f"r{index % len(requests)}"
                if scheduler.abort(rid):
                    aborted.add(rid)
                scheduler.check_invariants()
            case ("step", count):
                for _ in range(count):
                    loop.step()
    loop.finish()

    num_timeouts = 0
    for rid, (prompt, sampling) in requests.items():
        result = loop.results[rid]
        expected, reason = tokens_alone(prompt, sampling, changes["context_length"], eos_every)
        limit = min(len(prompt) + sampling.max_new_tokens, changes["context_length"])
        if len(prompt) > changes["context_length"] or max(len(prompt), limit - 1) > pool_tokens:
            assert (result.token_ids, result.finish_reason) == ([], "error")
            continue
        if rid in aborted:
            assert result.finish_reason is None
            assert result.token_ids == expected[: len(result.token_ids)]
        elif result.last is not None and result.last.status == 503:
            name = "waiting" if result.finish_reason == "error" else "running"
            timeout = changes[f"{name}_timeout"]
            assert 0 < timeout <= result.ended - result.arrived
            assert f"--request-{name}-timeout" in result.last.message
            assert result.token_ids == ([] if name == "waiting" else expected[: len(result.token_ids)])
            num_timeouts += 1
        else:
            assert (result.token_ids, result.finish_reason) == (expected, reason)
        delivered = result.token_ids or result.finish_reason == "length"
        assert result.prompt_logprobs == (prompt_logprobs_alone(prompt, sampling) if delivered else ())
    stats = scheduler.stats()
    assert stats.num_timeouts_total == num_timeouts
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages
    assert scheduler.flush_cache().ok
    assert scheduler.stats().num_free_pages == num_pages
    event(f"retractions: {min(stats.num_retractions_total, 5)}")
    event(f"timeouts: {min(num_timeouts, 5)}")
    event(f"prompts scored: {min(runner.num_scored, 20)}")
    event(f"prefix hits: {stats.num_cached_tokens_total > 0}")
    event(f"requests: {len(requests) // 5 * 5}+")
