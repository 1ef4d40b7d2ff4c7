"""The sampler against a slow definition in plain Python, by statistics, and for what must not matter to a row."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baleen.messages import OpenSlot, SamplingParams
from baleen.sampling import filters, sampler
from baleen.sampling.sampler import Sampler

EOS = 1


def opened(params: SamplingParams, history: Sequence[int] = (), num_prompt: int = 0) -> OpenSlot:
    return OpenSlot(sampling=params, pages=(), num_prompt=num_prompt, history=tuple(history))


def sampler_with(params: Sequence[SamplingParams], vocab_size: int, history: Sequence[int] = ()) -> Sampler:
    """A sampler whose slot i has params[i]."""
    made = Sampler(len(params), vocab_size, "cpu", [EOS])
    for slot, each in enumerate(params):
        made.open(slot, opened(each, history if each.needs_history else (), len(history) // 2))
    return made


# ---- the slow definition ---------------------------------------------------------------------------------------------


def naive_mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def naive_output(state: int, number: int) -> int:
    return naive_mix((state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64)


def naive_probabilities(
    logits: Sequence[float], params: SamplingParams, history: Sequence[int], num_prompt: int, num_output: int
) -> dict[int, float]:
    """Token id -> probability, of the tokens that may be drawn.

    num_output  tokens of the output so far; the slow definition knows only those in `history` by name
    """
    scores = list(logits)
    for token_id in set(history):
        factor = params.repetition_penalty
        scores[token_id] = scores[token_id] / factor if scores[token_id] > 0 else scores[token_id] * factor
    for token_id in history[num_prompt:]:
        scores[token_id] -= params.frequency_penalty
    for token_id in set(history[num_prompt:]):
        scores[token_id] -= params.presence_penalty
    for token_id, bias in params.logit_bias:
        scores[token_id] += bias
    if num_output < params.min_new_tokens:
        for token_id in {EOS, *params.stop_token_ids} & set(range(len(scores))):
            scores[token_id] = -math.inf
    order = sorted(range(len(scores)), key=lambda token_id: (-scores[token_id], token_id))
    if params.temperature == 0:
        return {order[0]: 1.0}
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = {i: math.exp((scores[i] - scores[order[0]]) / params.temperature) for i in order}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for token_id in order:
        if kept and sum(kept.values()) >= params.top_p * total:
            break
        if weights[token_id] >= params.min_p:
            kept[token_id] = weights[token_id]
    return {token_id: weight / sum(kept.values()) for token_id, weight in kept.items()}


def naive_draw(probabilities: dict[int, float], seed: int, position: int) -> tuple[int, float]:
    """The winner of the race and by what factor it won."""
    key = naive_output(naive_output(seed, 0), position)
    scores = {}
    for token_id, probability in probabilities.items():
        uniform = (naive_output(key, token_id) % 2**63) / 2**63
        scores[token_id] = probability / -math.log1p(-uniform)
    first, *others = sorted(scores, key=lambda token_id: -scores[token_id])
    return first, scores[first] / scores[others[0]] if others else math.inf


def random_params(rng: random.Random) -> SamplingParams:
    """Each parameter set or not, so that all combinations come up."""

    def maybe(value: float, default: float) -> float:
        return value if rng.random() < 0.5 else default

    return SamplingParams(
        temperature=maybe(rng.uniform(0.1, 2.0), rng.choice([0.0, 1.0])),
        top_p=maybe(rng.uniform(0.05, 1.0), 1.0),
        top_k=int(maybe(rng.choice([1, 2, 5, 40, 300]), -1)),
        min_p=maybe(rng.uniform(0.0, 0.3), 0.0),
        frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
        presence_penalty=maybe(rng.uniform(-1, 1), 0.0),
        repetition_penalty=maybe(rng.uniform(0.7, 1.5), 1.0),
        logit_bias=tuple((i, rng.choice([-100.0, -1.0, 4.0, 9.0])) for i in range(50) if rng.random() < 0.1)
        if rng.random() < 0.4
        else (),
        min_new_tokens=rng.choice([0, 0, 600]),
        stop_token_ids=rng.choice([(), (2, 7), (3, 10**9)]),
        seed=rng.choice([rng.getrandbits(63), -rng.getrandbits(63), rng.randrange(4)]),
    )


def bfloat16_logits(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Logits as a bfloat16 head gives them: with equal values."""
    return (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3).bfloat16().float()


def test_against_the_slow_definition() -> None:
    vocab_size, rows = 403, 200
    rng = random.Random(0)
    params = [random_params(rng) for _ in range(rows)]
    history = [rng.randrange(vocab_size) for _ in range(30)]
    logits = bfloat16_logits(rows, vocab_size, 0)
    positions = [rng.choice([rng.randrange(15, 100_000), rng.randrange(600, 630)]) for _ in range(rows)]
    logits[::2, EOS] = logits[::2].amax(dim=1)  # what is held back would often be drawn
    before = logits.clone()
    ids = sampler_with(params, vocab_size, history).sample(logits, range(rows), positions).ids.tolist()
    assert torch.equal(logits, before)
    num_clear = 0
    for row in range(rows):
        seen = history if params[row].needs_history else []
        num_prompt = len(history) // 2
        num_output = positions[row] - num_prompt
        probabilities = naive_probabilities(logits[row].tolist(), params[row], seen, num_prompt, num_output)
        expected, lead = naive_draw(probabilities, params[row].seed or 0, positions[row])
        # The slow definition is in float64: a photo finish may differ.
        if lead > 1 + 1e-5:
            num_clear += 1
            assert ids[row] == expected, (row, params[row])
    assert num_clear >= rows - 2


# ---- distributions ---------------------------------------------------------------------------------------------------

NUM_DRAWS = 40_000

DISTRIBUTIONS = {
    "temperature": SamplingParams(temperature=0.7, seed=1),
    "min_p": SamplingParams(temperature=1.5, min_p=0.1, seed=2),
    "top_k": SamplingParams(temperature=1.3, top_k=10, seed=3),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8, seed=4),
    "all": SamplingParams(temperature=1.2, top_k=30, top_p=0.9, min_p=0.02, seed=5),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_frequencies_follow_the_distribution_of_transformers(name: str) -> None:
    """Total variation of 40,000 draws of 64 tokens: at most 0.5 * sqrt(2 * 64 / (pi * 40000)) = 0.016 by chance."""
    params = DISTRIBUTIONS[name]
    vocab_size = 64
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(7)) * 1.5
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    warpers.append(TopKLogitsWarper(params.top_k if params.top_k > 0 else vocab_size))
    warpers.append(TopPLogitsWarper(params.top_p))
    warpers.append(MinPLogitsWarper(params.min_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(dim=1)[0]
    made = sampler_with([params], vocab_size)
    ids = made.sample(logits.expand(NUM_DRAWS, -1), [0] * NUM_DRAWS, range(1, NUM_DRAWS + 1)).ids
    frequencies = ids.bincount(minlength=vocab_size) / NUM_DRAWS
    assert not frequencies[expected == 0].any()
    assert float((frequencies - expected).abs().sum()) / 2 < 0.02


@pytest.mark.parametrize("step", ["position", "seed"])
def test_tokens_of_neighbours_are_independent(step: str) -> None:
    """8 equal tokens, the 64 pairs (this, next) of 40,000 draws: chi-square of 63 passes 124 once in 100,000."""
    if step == "position":
        made = sampler_with([SamplingParams(seed=11)], 8)
        ids = made.sample(torch.zeros(NUM_DRAWS, 8), [0] * NUM_DRAWS, range(1, NUM_DRAWS + 1)).ids
    else:
        made = sampler_with([SamplingParams(seed=seed) for seed in range(NUM_DRAWS)], 8)
        ids = made.sample(torch.zeros(NUM_DRAWS, 8), range(NUM_DRAWS), [1000] * NUM_DRAWS).ids
    counts = (ids[0::2] * 8 + ids[1::2]).bincount(minlength=64).double()
    mean = NUM_DRAWS / 2 / 64
    assert float(((counts - mean) ** 2 / mean).sum()) < 124


def test_top_p_is_not_rounded() -> None:
    """0.6 of 25 equal tokens is 15 of them; 0.6 in float32 is more than 0.6 and would be 16."""
    made = sampler_with([SamplingParams(top_p=0.6)], 25)
    ids = made.sample(torch.zeros(800, 25), [0] * 800, range(800)).ids
    assert set(ids.tolist()) == set(range(15))


# ---- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1003, 4096])
def test_rows_do_not_depend_on_their_batch(vocab_size: int) -> None:
    """All kinds of rows at once, one by one, in other orders and sizes: the same tokens."""
    rows = 48
    rng = random.Random(1)
    params = [random_params(rng) for _ in range(rows)]
    history = [rng.randrange(vocab_size) for _ in range(50)]
    logits = bfloat16_logits(rows, vocab_size, 1)
    positions = [rng.randrange(1, 1000) for _ in range(rows)]

    def sample(chosen: list[int]) -> list[int]:
        made = sampler_with(params, vocab_size, history)
        return made.sample(logits[chosen], chosen, [positions[row] for row in chosen]).ids.tolist()

    together = sample(list(range(rows)))
    for row in range(rows):
        assert sample([row]) == [together[row]], params[row]
    for size in (2, 5, 17, rows):
        chosen = rng.sample(range(rows), size)
        assert sample(chosen) == [together[row] for row in chosen]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab_size = 20, 100
    rng = random.Random(2)
    params = [random_params(rng) for _ in range(rows)]
    logits = bfloat16_logits(rows, vocab_size, 2)
    whole = sampler_with(params, vocab_size, range(9)).sample(logits, range(rows), range(rows)).ids
    monkeypatch.setattr(sampler, "_CHUNK_ELEMENTS", 300)
    assert torch.equal(sampler_with(params, vocab_size, range(9)).sample(logits, range(rows), range(rows)).ids, whole)


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    logits = torch.zeros(1, 1000)

    def tokens(seed: int | None) -> list[int]:
        made = sampler_with([SamplingParams(seed=seed)], 1000)
        return [int(made.sample(logits, [0], [position]).ids) for position in range(1, 21)]

    assert tokens(42) == tokens(42)
    assert len(set(tokens(42))) > 15
    assert sum(a == b for a, b in zip(tokens(42), tokens(43))) <= 1
    assert tokens(None) == tokens(0)


def test_greedy_rows_are_argmax_in_any_batch() -> None:
    logits = bfloat16_logits(6, 700, 3)
    logits[:, [650, 20, 333]] = 50.0
    greedy = SamplingParams(temperature=0.0, top_p=0.5, top_k=7, min_p=0.1)
    params = [greedy, SamplingParams(), greedy, SamplingParams(top_p=0.9), greedy, SamplingParams(top_k=5)]
    mixed = sampler_with(params, 700).sample(logits, range(6), range(6)).ids
    assert mixed[[0, 2, 4]].tolist() == [20, 20, 20]
    assert sampler_with([greedy] * 6, 700).sample(logits, range(6), range(6)).ids.tolist() == [20] * 6


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1e-5), SamplingParams(top_k=1), SamplingParams(top_p=0.0), SamplingParams(min_p=1.0)],
    ids=["temperature", "top_k", "top_p", "min_p"],
)
def test_limits_of_sampling_are_greedy(params: SamplingParams) -> None:
    logits = torch.randn(30, 500, generator=torch.Generator().manual_seed(8))
    made = sampler_with([params] * 30, 500)
    assert torch.equal(made.sample(logits, range(30), range(30)).ids, logits.argmax(dim=1))


def test_top_k_of_the_vocabulary_or_more_keeps_all() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(9))
    plain = sampler_with([SamplingParams(seed=3)] * 20, 300).sample(logits, range(20), range(20)).ids
    for top_k in (300, 10**9, -1):
        made = sampler_with([SamplingParams(seed=3, top_k=top_k)] * 20, 300)
        assert torch.equal(made.sample(logits, range(20), range(20)).ids, plain)


# ---- broken rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.9, repetition_penalty=1.2, presence_penalty=0.5),
    ],
    ids=["greedy", "race", "top_k", "top_p", "penalties"],
)
def test_rows_with_nan_or_infinity_give_no_token_and_harm_no_other(others: SamplingParams) -> None:
    logits = bfloat16_logits(6, 200, 4)
    clean = sampler_with([others] * 6, 200, [1, 2, 3]).sample(logits, range(6), range(6)).ids
    broken = logits.clone()
    broken[1, 77] = math.nan
    broken[3, 0] = math.inf
    broken[4] = -math.inf
    broken[5, 150:] = -math.inf
    made = sampler_with([others] * 6, 200, [1, 2, 3])
    ids = made.sample(broken, range(6), range(6)).ids
    assert ids[[1, 3, 4]].tolist() == [-1, -1, -1]
    assert torch.equal(ids[[0, 2]], clean[[0, 2]])
    assert 0 <= int(ids[5]) < 150
    assert torch.equal(made.sample(logits[[1, 3]], [1, 3], [1, 3]).ids, clean[[1, 3]])


# ---- state -----------------------------------------------------------------------------------------------------------


def test_a_slot_opened_again_forgets() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    strict = SamplingParams(temperature=0.0, presence_penalty=10.0, logprobs=1)
    made = Sampler(2, 4, "cpu")
    made.open(1, opened(strict))
    assert [int(made.sample(logits, [1], [position]).ids) for position in range(4)] == [0, 1, 2, 3]
    made.open(1, opened(strict))
    assert int(made.sample(logits, [1], [4]).ids) == 0
    made.open(1, opened(SamplingParams(temperature=0.0)))
    again = made.sample(logits, [1], [5])
    assert int(again.ids) == 0
    assert again.logprobs is None


def test_slots_without_penalties_hold_no_counts() -> None:
    made = Sampler(64, 10, "cpu")
    for slot in range(64):
        made.open(slot, opened(SamplingParams(presence_penalty=1.0)))
        made.open(slot, opened(SamplingParams()))
    assert made._history._table.shape[0] == 1


def test_reopening_with_its_history_continues() -> None:
    """A request that was retracted draws the tokens that it would have drawn."""
    params = SamplingParams(temperature=1.0, top_p=0.95, frequency_penalty=0.4, repetition_penalty=1.2, seed=9)
    logits = bfloat16_logits(20, 50, 5)
    prompt = [1, 2, 3]

    def run(reopen_at: int | None) -> list[int]:
        made = Sampler(3, 50, "cpu")
        made.open(0, opened(params, prompt, 3))
        tokens: list[int] = []
        slot = 0
        for step in range(20):
            if step == reopen_at:
                slot = 2
                made.open(slot, opened(params, prompt + tokens, 3))
            tokens.append(int(made.sample(logits[step : step + 1], [slot], [3 + step]).ids))
        return tokens

    straight = run(None)
    assert run(1) == straight
    assert run(13) == straight
    unpenalised = SamplingParams(temperature=1.0, top_p=0.95, seed=9)
    free = sampler_with([unpenalised] * 20, 50).sample(logits, range(20), range(3, 23)).ids.tolist()
    assert free != straight


def test_logprobs_are_of_the_raw_logits_for_rows_that_asked() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, presence_penalty=9.0, repetition_penalty=3.0, logprobs=2),
        SamplingParams(temperature=0.1, seed=1, logprobs=0),
    ]
    made = sampler_with(params, 3, [0, 1])
    result = made.sample(logits, [0, 1, 2], [5, 5, 5])
    assert result.ids.tolist() == [1, 2, 1]
    assert result.logprobs is not None
    exact = torch.tensor([1.0, 3.0, 2.0]).log_softmax(0).tolist()
    none, penalised, plain = result.logprobs
    assert none is None
    assert penalised is not None
    assert penalised.logprob == pytest.approx(exact[2])
    assert [token_id for token_id, _ in penalised.top] == [1, 2]
    assert [logprob for _, logprob in penalised.top] == pytest.approx([exact[1], exact[2]])
    assert plain is not None
    assert plain.logprob == pytest.approx(exact[1])
    assert plain.top == ()


def test_no_rows() -> None:
    result = sampler_with([SamplingParams()], 10).sample(torch.zeros(0, 10), [], [])
    assert result.ids.tolist() == []
    assert result.ids.dtype == torch.int64
    assert result.logprobs is None


def test_sampling_never_waits_for_the_device() -> None:
    """Tensors on the meta device have no data: anything that looked at a value would raise."""
    rng = random.Random(3)
    params = [random_params(rng) for _ in range(40)]
    params += [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5), SamplingParams(temperature=0.0)]
    made = Sampler(len(params), 500, "meta")
    for slot, each in enumerate(params):
        made.open(slot, opened(each, [1, 2, 3] if each.needs_history else (), 2))
    rows = len(params)
    result = made.sample(torch.zeros(rows, 500, device="meta"), range(rows), range(rows))
    assert result.ids.shape == (rows,)
    assert result.ids.device.type == "meta"


def test_a_vocabulary_that_does_not_fit_the_sort_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Sampler(1, filters.MAX_VOCAB_SIZE + 1, "cpu")


@pytest.mark.parametrize(
    ("params", "likeliest"),
    [
        (SamplingParams(temperature=0.0), True),
        (SamplingParams(temperature=0.7, top_k=1), True),
        (SamplingParams(temperature=0.7), False),
        (SamplingParams(temperature=0.0, frequency_penalty=0.5), False),
        (SamplingParams(temperature=0.0, logit_bias=((3, 1.0),)), False),
        (SamplingParams(temperature=0.0, logprobs=1), False),
        (SamplingParams(temperature=0.0, min_new_tokens=4), False),
    ],
)
def test_who_takes_the_likeliest_id(params: SamplingParams, likeliest: bool) -> None:
    made = sampler_with([SamplingParams(temperature=0.0), params], 8)
    assert made.takes_likeliest([0], [3])
    assert made.takes_likeliest([1, 0], [3, 3]) is likeliest
    assert made.takes_likeliest([1], [4]) is (likeliest or params.min_new_tokens == 4), "held back no longer"
