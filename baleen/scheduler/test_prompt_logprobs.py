"""Which positions of a prompt are scored, and that each is scored once, whatever the cache and the pages do."""

from __future__ import annotations

import pytest

from baleen.messages import GenerateRequest, StepOutput, TokenLogprobs, pack_ids
from baleen.scheduler.conftest import (
    NAN_PROMPT_TEMPERATURE,
    Loop,
    make,
    prompt,
    prompt_logprobs_alone,
    sampling,
    tokens_alone,
)


def scored(loop: Loop) -> list[tuple[int, int]]:
    """(first position, number of tokens) of each row that scores."""
    rows = (row.scored for batch in loop.batches for row in batch.rows)
    return [(part.start, len(part.token_ids)) for part in rows if part is not None]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (None, []),
        (0, [(0, 8), (8, 8), (16, 3)]),
        (1, [(0, 8), (8, 8), (16, 3)]),
        (2, [(1, 7), (8, 8), (16, 3)]),
        (8, [(7, 1), (8, 8), (16, 3)]),
        (9, [(8, 8), (16, 3)]),
        (19, [(18, 1)]),
        (20, []),
    ],
)
def test_each_chunk_scores_the_tokens_after_its_own(
    depth: int, first: int | None, expected: list[tuple[int, int]]
) -> None:
    loop = make(depth, chunked_prefill_size=8)
    params = sampling(3, prompt_logprobs=first)
    loop.add("a", prompt(1, 20), params)
    loop.finish()
    assert scored(loop) == expected
    for batch in loop.batches:
        for row in batch.rows:
            if row.scored is not None:
                start = row.scored.start + 1
                assert list(row.scored.token_ids) == prompt(1, 20)[start : start + len(row.scored.token_ids)]
    got = loop.results["a"].prompt_logprobs
    assert got == prompt_logprobs_alone(prompt(1, 20), params)
    assert len(got) == (20 - first if first is not None else 0)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_scoring_alone(length: int) -> None:
    """max_new_tokens 0: one output with no ids, finish_reason length, and the whole prompt's logprobs."""
    loop = make(chunked_prefill_size=4)
    params = sampling(0, prompt_logprobs=0)
    loop.add("a", prompt(1, length), params)
    loop.finish()
    last = loop.results["a"].last
    assert last is not None
    assert (last.token_ids, last.finish_reason) == ((), "length")
    assert last.prompt_logprobs == prompt_logprobs_alone(prompt(1, length), params)
    assert last.prompt_logprobs[0] is None


@pytest.mark.parametrize(("first", "cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (9, 8), (13, 12), (17, 16), (18, 16)])
def test_a_hit_covers_no_position_that_is_scored(first: int, cached: int) -> None:
    loop = make()
    loop.add("warm", prompt(1, 18), sampling(1))
    loop.finish()
    params = sampling(2, prompt_logprobs=first)
    loop.add("a", prompt(1, 18), params)
    loop.finish()
    result = loop.results["a"]
    assert result.last is not None
    assert result.last.num_cached_tokens == cached
    assert result.prompt_logprobs == prompt_logprobs_alone(prompt(1, 18), params)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_prompt_retracted_while_it_is_scored_goes_on_where_it_was(depth: int) -> None:
    loop = make(depth, num_pages=16, chunked_prefill_size=5, schedule_conservativeness=0.0)
    loop.add("old", prompt(1, 14), sampling(30))
    for _ in range(5):
        loop.step()
    params = sampling(2, prompt_logprobs=0)
    loop.add("scored", prompt(2, 40), params)
    while not loop.scheduler.stats().num_retractions_total:
        loop.step()
    assert not loop.results["scored"].token_ids, "it was retracted within its prompt"
    assert 0 < loop.runner.num_scored < 39
    loop.finish()
    assert loop.results["scored"].prompt_logprobs == prompt_logprobs_alone(prompt(2, 40), params)
    assert loop.results["scored"].token_ids == tokens_alone(prompt(2, 40), params, 1000, 1 << 40)[0]
    assert loop.runner.num_scored == 39, "each position once"


@pytest.mark.parametrize("depth", [1, 2])
def test_nan_in_a_prompt_ends_the_request_and_keeps_nothing_of_it(depth: int) -> None:
    for max_new_tokens in (0, 5):
        loop = make(depth, chunked_prefill_size=8)
        params = sampling(max_new_tokens, temperature=NAN_PROMPT_TEMPERATURE, prompt_logprobs=3)
        loop.add("nan", prompt(1, 17), params)
        loop.finish()
        result = loop.results["nan"]
        assert result.last is not None
        assert (result.finish_reason, result.token_ids, result.prompt_logprobs) == ("error", [], ())
        assert "NaN" in result.last.message
        assert loop.scheduler.stats().num_cached_pages == 0


def test_a_step_that_scores_must_bring_its_scores() -> None:
    scheduler = make().scheduler
    message = GenerateRequest(rid="a", input_ids=pack_ids([1, 2]), sampling=sampling(2, prompt_logprobs=0, logprobs=1))
    scheduler.add(message)
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(ValueError, match="scores 1 prompts, not 0"):
        scheduler.update(StepOutput(batch.step, (3,)))
    entry = TokenLogprobs(-0.5, ((2, -0.5),))
    (output,) = scheduler.update(StepOutput(batch.step, (3,), prompt_logprobs=((entry,),)))
    assert output.prompt_logprobs == (None, entry)
