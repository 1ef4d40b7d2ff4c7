"""logit_bias and min_new_tokens, by what they do to a row. The slow definition in test_sampler.py has both as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from baleen.messages import OpenSlot, SamplingParams
from baleen.sampling.sampler import Sampler

EOS, STOP = 1, 4
DRAWS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=1, top_p=0.9),
    SamplingParams(seed=1, top_k=3),
    SamplingParams(seed=1, temperature=50.0),
]
DRAW_NAMES = ["greedy", "race", "top_p", "top_k", "hot"]


def with_fields(params: SamplingParams, **fields: object) -> SamplingParams:
    values = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**values, **fields})


def sampler(params: Sequence[SamplingParams], vocab_size: int = 8, num_prompt: int = 10) -> Sampler:
    made = Sampler(len(params), vocab_size, "cpu", [EOS])
    for slot, each in enumerate(params):
        made.open(slot, OpenSlot(sampling=each, pages=(), num_prompt=num_prompt))
    return made


@pytest.mark.parametrize("draw", DRAWS, ids=DRAW_NAMES)
def test_bias_of_100_forbids_and_forces(draw: SamplingParams) -> None:
    logits = torch.zeros(60, 8)
    made = sampler([with_fields(draw, logit_bias=((5, 100.0),)), with_fields(draw, logit_bias=((0, -100.0),)), draw])
    positions = range(10, 70)
    if draw.temperature <= 1:
        assert set(made.sample(logits, [0] * 60, positions).ids.tolist()) == {5}
        assert 0 not in made.sample(logits, [1] * 60, positions).ids.tolist()
    assert 0 in made.sample(logits, [2] * 60, positions).ids.tolist()


def test_bias_comes_after_the_penalties() -> None:
    """A repetition penalty scales what the model says, not what the user adds to it: 4 / 2 + 1 = 3, not 5 / 2."""
    logits = torch.tensor([[4.0, 2.75]])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias=((0, 1.0),))
    made = Sampler(1, 2, "cpu")
    made.open(0, OpenSlot(sampling=params, pages=(), num_prompt=1, history=(0,)))
    assert made.sample(logits, [0], [1]).ids.tolist() == [0]


def test_logprobs_are_those_without_the_bias() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    params = SamplingParams(temperature=0.0, logit_bias=((2, 50.0), (0, -50.0)), min_new_tokens=5, logprobs=1)
    result = sampler([params], 3).sample(logits, [0], [10])
    assert result.ids.tolist() == [2]
    assert result.logprobs is not None
    (entry,) = result.logprobs
    assert entry is not None
    exact = logits[0].log_softmax(0).tolist()
    assert entry.logprob == pytest.approx(exact[2])
    assert entry.top == ((0, pytest.approx(exact[0])),)


@pytest.mark.parametrize("draw", DRAWS, ids=DRAW_NAMES)
def test_neither_eos_nor_a_stop_id_before_min_new_tokens(draw: SamplingParams) -> None:
    """The likeliest tokens by far, until 5 tokens exist: with a prompt of 10, positions 10 to 14 are held."""
    logits = torch.zeros(1, 8)
    logits[0, [EOS, STOP]] = 1000.0
    made = sampler([with_fields(draw, min_new_tokens=5, stop_token_ids=(STOP, 10**9))])
    for position in range(10, 15):
        assert int(made.sample(logits, [0], [position]).ids) not in (EOS, STOP)
    assert int(made.sample(logits, [0], [15]).ids) in (EOS, STOP)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_new_tokens_without_stop_ids_holds_eos_alone(ignore_eos: bool) -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0, 8.0]])
    made = sampler([SamplingParams(temperature=0.0, min_new_tokens=1, ignore_eos=ignore_eos)], 5)
    assert made.sample(logits, [0], [10]).ids.tolist() == [4]


@pytest.mark.parametrize("draw", DRAWS, ids=DRAW_NAMES)
def test_what_the_grammar_alone_allows_is_chosen(draw: SamplingParams) -> None:
    """All but eos at -inf: the grammar is complete. All but eos and another: the other."""
    params = with_fields(draw, min_new_tokens=100, stop_token_ids=(STOP,), logit_bias=((EOS, -100.0), (6, -100.0)))
    logits = torch.full((3, 8), -math.inf)
    logits[0, EOS] = -3.0
    logits[1, [EOS, 6]] = torch.tensor([30.0, -30.0])
    logits[2, [EOS, STOP]] = torch.tensor([1000.0, -50.0])
    made = sampler([params] * 3)
    assert made.sample(logits, range(3), [10] * 3).ids.tolist() == [EOS, 6, EOS]


def test_bad_logits_stay_bad() -> None:
    """At a token that is held back or biased as well."""
    params = SamplingParams(temperature=0.0, min_new_tokens=5, logit_bias=((EOS, -100.0), (2, -100.0)))
    logits = torch.zeros(4, 8)
    logits[0, EOS] = math.nan
    logits[1, EOS] = math.inf
    logits[2] = -math.inf
    ids = sampler([params] * 4).sample(logits, range(4), [10] * 4).ids.tolist()
    assert ids[:3] == [-1, -1, -1]
    assert ids[3] == 0


def test_a_slot_opened_again_forgets() -> None:
    made = sampler([SamplingParams(temperature=0.0, min_new_tokens=50, logit_bias=((5, 100.0),))])
    logits = torch.zeros(1, 8)
    logits[0, EOS] = 1.0
    assert made.sample(logits, [0], [10]).ids.tolist() == [5]
    made.open(0, OpenSlot(sampling=SamplingParams(temperature=0.0), pages=(), num_prompt=10))
    assert made.sample(logits, [0], [10]).ids.tolist() == [EOS]
