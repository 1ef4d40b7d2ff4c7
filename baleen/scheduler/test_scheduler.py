"""What the scheduler does, one behaviour at a time. The properties are in test_scheduler_properties.py."""

from __future__ import annotations

import time

import pytest

from baleen.messages import GenerateRequest, StepOutput, TokenLogprobs, pack_ids
from baleen.scheduler.conftest import (
    EOS,
    NAN_TEMPERATURE,
    NEVER,
    Loop,
    choose,
    make,
    prompt,
    sampling,
    tokens_alone,
)


def shape(loop: Loop) -> list[list[tuple[int, int]]]:
    """(start, number of tokens) of each row of each batch."""
    return [[(row.start, row.num_tokens) for row in batch.rows] for batch in loop.batches]


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_decode_rows_come_first_and_prefill_takes_the_rest_of_the_budget(depth: int) -> None:
    loop = make(depth, chunked_prefill_size=10)
    loop.add("a", prompt(1, 6), sampling(4))
    loop.add("b", prompt(2, 15), sampling(2))
    loop.finish()
    assert shape(loop) == [[(0, 6), (0, 4)], [(6, 1), (4, 9)], [(7, 1), (13, 2)], [(8, 1), (15, 1)]]
    assert [row.sample for batch in loop.batches for row in batch.rows] == [True, False, True, False] + [True] * 4


def test_depth_2_computes_one_token_beyond_an_eos_and_drops_it() -> None:
    steps = {}
    for depth in (1, 2):
        loop = make(depth, eos_every=3)
        loop.add("a", prompt(5, 6), sampling(50))
        loop.finish()
        expected, reason = tokens_alone(prompt(5, 6), sampling(50), 1000, 3)
        assert reason == "stop"
        assert len(expected) > 1
        assert loop.results["a"].token_ids == expected
        steps[depth] = len(loop.batches)
    assert steps == {1: len(expected), 2: len(expected) + 1}


@pytest.mark.parametrize("depth", [1, 2])
def test_lengths_known_ahead_cost_no_extra_token(depth: int) -> None:
    loop = make(depth, context_length=20)
    loop.add("a", prompt(1, 6), sampling(3))
    loop.add("b", prompt(2, 16), sampling(100))
    loop.finish()
    assert [len(batch.rows) for batch in loop.batches] == [2, 2, 2, 1]
    assert loop.results["b"].finish_reason == "length"
    assert len(loop.results["b"].token_ids) == 4


def test_slots_are_few_and_reused() -> None:
    loop = make(max_running_requests=2)
    for rid in "abcde":
        loop.add(rid, prompt(ord(rid), 5), sampling(3))
    loop.finish()
    assert {row.slot for batch in loop.batches for row in batch.rows} == {0, 1}
    assert [len(batch.rows) for batch in loop.batches] == [2] * 6 + [1] * 3


def test_budget_smaller_than_the_slots_still_holds() -> None:
    loop = make(chunked_prefill_size=3)
    loop.max_step_tokens = 3
    for rid in "abcde":
        loop.add(rid, prompt(ord(rid), 7), sampling(30))
    loop.finish()
    assert all(len(result.token_ids) == 30 for result in loop.results.values())


def test_no_chunking() -> None:
    loop = make(chunked_prefill_size=-1)
    loop.add("a", prompt(1, 100), sampling(1))
    loop.add("b", prompt(2, 100), sampling(1))
    loop.finish()
    assert shape(loop) == [[(0, 100), (0, 100)]]


# ---- the end of a request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_max_new_tokens_0_computes_the_prompt_and_samples_nothing(depth: int) -> None:
    loop = make(depth)
    loop.add("a", prompt(1, 9), sampling(0))
    loop.add("full", prompt(2, 9), sampling(5))
    loop.finish()
    assert [row.sample for row in loop.batches[0].rows] == [False, True]
    last = loop.results["a"].last
    assert last is not None
    assert (last.finish_reason, last.token_ids, last.num_prompt_tokens) == ("length", (), 9)
    assert len(loop.results["full"].token_ids) == 5
    loop.add("again", prompt(1, 9), sampling(1))
    loop.finish()
    assert loop.results["again"].last.num_cached_tokens == 8


def test_prompt_that_fills_the_context_ends_by_length() -> None:
    loop = make(context_length=10)
    loop.add("a", prompt(1, 10), sampling(5))
    loop.finish()
    assert (loop.results["a"].finish_reason, loop.results["a"].token_ids) == ("length", [])


def test_prompt_beyond_the_context_is_refused() -> None:
    loop = make(context_length=10)
    loop.add("a", prompt(1, 11), sampling(5))
    assert loop.results["a"].finish_reason == "error"
    assert "context length 10" in loop.results["a"].last.message
    assert not loop.scheduler.has_work()


def test_request_that_can_never_fit_is_refused() -> None:
    loop = make(num_pages=8)  # 32 tokens
    loop.add("fits", prompt(1, 20), sampling(13))  # the 13th token needs no KV
    loop.add("big", prompt(2, 20), sampling(14))
    assert loop.results["big"].finish_reason == "error"
    assert "max_total_tokens=32" in loop.results["big"].last.message
    loop.finish()
    assert len(loop.results["fits"].token_ids) == 13


def test_stop_token_ids_and_ignore_eos() -> None:
    history = prompt(3, 6)
    expected, _ = tokens_alone(history, sampling(30, ignore_eos=True), 1000, 5)
    assert EOS in expected[:-1]
    stop = expected[2]
    loop = make(eos_every=5)
    loop.add("stop", history, sampling(30, stop_token_ids=(stop,)))
    loop.add("eos", history, sampling(30))
    loop.add("ignore", history, sampling(30, stop_token_ids=(stop,), ignore_eos=True))
    loop.finish()
    first = {rid: result.last for rid, result in loop.results.items()}
    end = min(expected.index(stop), expected.index(EOS))
    assert loop.results["stop"].token_ids == expected[: end + 1]
    assert (first["stop"].finish_reason, first["stop"].matched) == ("stop", expected[end])
    assert loop.results["eos"].token_ids == expected[: expected.index(EOS) + 1]
    assert (first["eos"].finish_reason, first["eos"].matched) == ("stop", EOS)
    assert loop.results["ignore"].token_ids == expected
    assert (first["ignore"].finish_reason, first["ignore"].matched) == ("length", None)


@pytest.mark.parametrize("depth", [1, 2])
def test_nan_ends_one_request_and_keeps_nothing_of_it(depth: int) -> None:
    loop = make(depth)
    loop.add("nan", prompt(1, 10), sampling(20, temperature=NAN_TEMPERATURE))
    loop.add("good", prompt(2, 10), sampling(20))
    loop.finish()
    last = loop.results["nan"].last
    assert (last.finish_reason, last.token_ids) == ("error", ())
    assert "NaN" in last.message
    assert len(loop.results["nan"].token_ids) == 3
    assert len(loop.results["good"].token_ids) == 20
    loop.add("again", prompt(1, 10), sampling(1))
    loop.add("good again", prompt(2, 10), sampling(1))
    loop.finish()
    assert loop.results["again"].last.num_cached_tokens == 0
    assert loop.results["good again"].last.num_cached_tokens == 8


def test_logprobs_are_passed_on() -> None:
    scheduler = make().scheduler
    for rid in "ab":
        scheduler.add(GenerateRequest(rid=rid, input_ids=pack_ids([1, 2]), sampling=sampling(2)))
    batch = scheduler.schedule()
    logprobs = TokenLogprobs(-0.5, ((3, -0.5),))
    outputs = scheduler.update(StepOutput(batch.step, (3, 4), (None, logprobs)))
    assert [output.logprobs for output in outputs] == [(), (logprobs,)]


def test_outputs_must_come_in_order_and_complete() -> None:
    scheduler = make().scheduler
    scheduler.add(GenerateRequest(rid="a", input_ids=pack_ids([1, 2]), sampling=sampling(5)))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(ValueError, match="not that of the oldest"):
        scheduler.update(StepOutput(second.step, (1,)))
    with pytest.raises(ValueError, match="samples 1 tokens, not 2"):
        scheduler.update(StepOutput(first.step, (1, 2)))
    assert scheduler.update(StepOutput(first.step, (1,)))[0].token_ids == (1,)


def test_rid_in_use_is_an_error() -> None:
    loop = make()
    loop.add("a", [1], sampling(1))
    with pytest.raises(ValueError, match="'a' exists already"):
        loop.add("a", [1], sampling(1))
    loop.finish()
    loop.add("a", [1], sampling(1))


# ---- abort -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_frees_pages_at_once(depth: int, num_steps: int) -> None:
    loop = make(depth, disable_radix_cache=True)
    loop.add("a", prompt(1, 9), sampling(20))
    for _ in range(num_steps):
        loop.step()
    assert (loop.scheduler.stats().num_free_pages < 64) == (num_steps > 0)
    num_tokens = len(loop.results["a"].token_ids)
    assert loop.scheduler.abort("a")
    assert loop.scheduler.stats().num_free_pages == 64
    loop.scheduler.check_invariants()
    assert not loop.scheduler.abort("a")
    assert not loop.scheduler.abort("nobody")
    loop.finish()
    assert len(loop.results["a"].token_ids) == num_tokens, "no output follows"
    assert loop.scheduler.stats().num_aborted_total == 1


def test_slot_and_pages_of_an_aborted_request_are_reused_while_its_step_is_in_flight() -> None:
    loop = make(depth=2, max_running_requests=1, num_pages=4, disable_radix_cache=True)
    loop.add("a", prompt(1, 9), sampling(5))
    loop.step()
    loop.step()
    loop.scheduler.abort("a")
    loop.add("b", prompt(2, 10), sampling(6))
    loop.finish()
    assert loop.results["b"].token_ids == tokens_alone(prompt(2, 10), sampling(6), 1000, NEVER)[0]


# ---- prefix cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "cached"), [(12, 8), (13, 12), (4, 0), (5, 4)])
def test_a_hit_covers_whole_pages_and_never_the_last_token(length: int, cached: int) -> None:
    loop = make()
    loop.add("a", prompt(1, 16), sampling(1))
    loop.finish()
    loop.add("b", prompt(1, 16)[:length], sampling(3))
    loop.finish()
    assert loop.results["b"].last.num_cached_tokens == cached
    assert loop.batches[1].rows[0].start == cached
    assert loop.results["b"].token_ids == tokens_alone(prompt(1, 16)[:length], sampling(3), 1000, NEVER)[0]
    assert loop.scheduler.stats().num_cached_tokens_total == cached
    assert loop.scheduler.stats().num_prompt_tokens_total == 16 + length


def test_the_next_turn_finds_the_answer_too() -> None:
    loop = make()
    loop.add("a", prompt(1, 7), sampling(10))
    loop.finish()
    answer = loop.results["a"].token_ids
    loop.add("b", prompt(1, 7) + answer + [5, 6], sampling(2))
    loop.finish()
    assert loop.results["b"].last.num_cached_tokens == 16  # 17 tokens, the last one without KV


@pytest.mark.parametrize("chunked_prefill_size", [16, 100])
def test_equal_prompts_at_once_are_computed_once(chunked_prefill_size: int) -> None:
    loop = make(chunked_prefill_size=chunked_prefill_size)
    for rid in "abcd":
        loop.add(rid, prompt(1, 41), sampling(2))
    loop.finish()
    assert [loop.results[rid].last.num_cached_tokens for rid in "abcd"] == [0, 40, 40, 40]
    assert loop.runner.num_computed_tokens == 41 + 3 * 1 + 4 * 1


def test_a_page_that_a_chunk_and_then_decoding_fill_is_found_again() -> None:
    loop = make(chunked_prefill_size=5)
    loop.add("a", prompt(1, 7), sampling(10))
    loop.add("b", prompt(2, 7), sampling(1))
    loop.finish()
    loop.add("c", prompt(1, 7) + loop.results["a"].token_ids, sampling(1))
    loop.finish()
    assert loop.results["c"].last.num_cached_tokens == 16


def test_pages_are_shared_as_soon_as_their_chunk_is_scheduled() -> None:
    loop = make(chunked_prefill_size=16)
    loop.add("long", prompt(1, 60), sampling(2))
    loop.step()
    loop.add("short", prompt(1, 17), sampling(2))
    loop.step()
    loop.finish()
    assert loop.results["short"].last.num_cached_tokens == 16
    assert loop.results["short"].token_ids == tokens_alone(prompt(1, 17), sampling(2), 1000, NEVER)[0]


def test_disabled_cache_shares_nothing() -> None:
    loop = make(disable_radix_cache=True)
    for rid in "ab":
        loop.add(rid, prompt(1, 20), sampling(2))
    loop.finish()
    assert loop.results["b"].last.num_cached_tokens == 0
    assert shape(loop)[0] == [(0, 20), (0, 20)], "and nobody waits for a page to share"
    assert loop.scheduler.stats().num_free_pages == 64


def test_flush_cache_is_refused_while_requests_run() -> None:
    loop = make()
    loop.add("a", prompt(1, 20), sampling(5))
    loop.step()
    reply = loop.scheduler.flush_cache()
    assert not reply.ok
    assert "1 requests are running" in reply.message
    loop.finish()
    assert loop.scheduler.stats().num_cached_pages == 6
    assert loop.scheduler.flush_cache().ok
    assert loop.scheduler.stats().num_free_pages == 64
    loop.add("b", prompt(1, 20), sampling(5))
    loop.finish()
    assert loop.results["b"].last.num_cached_tokens == 0


def test_lpm_admits_hits_first() -> None:
    for policy, expected in (("fcfs", ["cold", "hit"]), ("lpm", ["hit", "cold"])):
        loop = make(max_running_requests=1, schedule_policy=policy)
        loop.add("warm", prompt(1, 20), sampling(1))
        loop.finish()
        loop.add("cold", prompt(2, 20), sampling(1))
        loop.add("hit", prompt(1, 20), sampling(1))
        ended = []
        while loop.scheduler.has_work():
            loop.step()
            ended += [rid for rid in ("cold", "hit") if loop.results[rid].finish_reason and rid not in ended]
        assert ended == expected


# ---- admission and retraction ----------------------------------------------------------------------------------------


def test_admission_keeps_pages_back_for_running_requests() -> None:
    loop = make(num_pages=16)
    loop.add("a", prompt(1, 4), sampling(41))  # 11 pages in the end, of which 70 % of 10 are kept back at first
    loop.add("b", prompt(2, 4), sampling(33))  # 9 pages
    loop.step()
    assert loop.scheduler.stats().num_running == 1
    eager = make(num_pages=16, schedule_conservativeness=0.0)
    eager.add("a", prompt(1, 4), sampling(41))
    eager.add("b", prompt(2, 4), sampling(33))
    eager.step()
    assert eager.scheduler.stats().num_running == 2


def test_fcfs_does_not_let_small_requests_pass_a_big_one() -> None:
    loop = make(num_pages=16)
    loop.add("running", prompt(1, 20), sampling(20))
    loop.step()
    loop.add("big", prompt(2, 50), sampling(10))
    loop.add("small", prompt(3, 4), sampling(2))
    while not loop.results["small"].finish_reason:
        loop.step()
        assert loop.results["running"].finish_reason or loop.scheduler.stats().num_running == 1
    loop.finish()


@pytest.mark.parametrize("disable_radix_cache", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_retraction_changes_no_token(depth: int, disable_radix_cache: bool) -> None:
    loop = make(depth, num_pages=16, schedule_conservativeness=0.0, disable_radix_cache=disable_radix_cache)
    for seed, rid in enumerate("abcd"):
        loop.add(rid, prompt(seed, 5 + seed), sampling(40, repetition_penalty=1.1))
    loop.finish()
    assert loop.scheduler.stats().num_retractions_total >= 2
    for seed, rid in enumerate("abcd"):
        expected, _ = tokens_alone(prompt(seed, 5 + seed), sampling(40), 1000, NEVER)
        assert loop.results[rid].token_ids == expected
        histories = [open_slot.history for open_slot in loop.runner.opened if open_slot.num_prompt == 5 + seed]
        for history in histories:
            assert list(history) == (prompt(seed, 5 + seed) + expected)[: len(history)]
        assert histories[0] == tuple(prompt(seed, 5 + seed))
    assert max(len(open_slot.history) - open_slot.num_prompt for open_slot in loop.runner.opened) > 0
    assert {result.last.num_cached_tokens for result in loop.results.values()} == {0}, "as of the first admission"
    assert loop.scheduler.stats().num_prompt_tokens_total == 5 + 6 + 7 + 8


def test_retracts_the_shortest_output_then_the_longest_prompt() -> None:
    loop = make(num_pages=14, schedule_conservativeness=0.0)
    loop.add("old", prompt(1, 10), sampling(38))
    loop.step()
    loop.step()
    loop.add("short", prompt(2, 5), sampling(28))
    loop.add("long", prompt(3, 9), sampling(24))
    loop.step()
    loop.add("later", prompt(4, 5), sampling(40))
    while not loop.scheduler.stats().num_retractions_total:
        loop.step()
    waiting = [request.rid for request in loop.scheduler._waiting]
    assert waiting == ["long", "later"]
    loop.finish()


def test_retracted_request_whose_last_token_ends_it() -> None:
    """Its last token is in flight when it is retracted; when it comes, the request ends while waiting."""
    loop = make(depth=2, num_pages=4, schedule_conservativeness=0.0)
    loop.add("a", prompt(1, 3), sampling(8))
    loop.step()
    loop.add("b", prompt(2, 4), sampling(5))
    loop.finish()
    assert loop.results["a"].token_ids == tokens_alone(prompt(1, 3), sampling(8), 1000, NEVER)[0]
    assert loop.results["b"].token_ids == tokens_alone(prompt(2, 4), sampling(5), 1000, NEVER)[0]
    assert loop.scheduler.stats().num_retractions_total == 1
    assert len(loop.runner.opened) == 2, "b is not admitted again"


def test_retracted_request_waits_for_its_tokens_in_flight() -> None:
    loop = make(depth=3, num_pages=12, schedule_conservativeness=0.0)
    for seed, rid in enumerate("ab"):
        loop.add(rid, prompt(seed, 4 + seed), sampling(40))
    while not loop.scheduler.stats().num_retractions_total:
        loop.step()
    assert loop.scheduler._waiting[0].rid == "b"
    assert loop.scheduler._waiting[0].num_pending
    loop.scheduler.abort("a")  # now there is room for b, but its next token is not known yet
    loop.finish()
    assert loop.results["b"].token_ids == tokens_alone(prompt(1, 5), sampling(40), 1000, NEVER)[0]


def test_new_token_ratio_rises_after_a_retraction_and_resets_when_idle() -> None:
    loop = make(num_pages=16, schedule_conservativeness=0.1)
    ratio = loop.scheduler._new_token_ratio
    assert ratio.value == pytest.approx(0.07)
    for seed, rid in enumerate("abcd"):
        loop.add(rid, prompt(seed, 5), sampling(40))
    while not loop.scheduler.stats().num_retractions_total:
        before = ratio.value
        loop.step()
    assert before < 0.069, "it falls while all goes well"
    assert ratio.value > 0.3
    loop.finish()
    loop.add("e", prompt(9, 5), sampling(1))
    loop.step()
    assert ratio.value == pytest.approx(0.07)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_a_decode_step_of_64_requests_schedules_well_under_1_ms() -> None:
    scheduler = make(num_pages=2000, page_size=64, max_running_requests=64, chunked_prefill_size=8192).scheduler
    for index in range(65):  # one keeps waiting for a slot
        message = GenerateRequest(rid=str(index), input_ids=pack_ids(prompt(index, 100)), sampling=sampling(300))
        scheduler.add(message)
    times = []
    for _ in range(130):
        start = time.perf_counter()
        batch = scheduler.schedule()
        token_ids = tuple(choose([row.start], NEVER) for row in batch.rows if row.sample)
        middle = time.perf_counter()
        scheduler.update(StepOutput(batch.step, token_ids))
        times.append((time.perf_counter() - start, time.perf_counter() - middle))
    assert len(batch.rows) == 64
    assert sorted(total for total, _ in times)[len(times) // 4] < 1e-3, "schedule and update together"
