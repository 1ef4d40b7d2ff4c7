"""Logprobs of prompts against transformers' full forward, whatever the chunks, the cache and the neighbours; and the
sampling fields that only a whole engine can show.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV32ForCausalLM

from baleen.engine import Engine
from baleen.flags import default_config
from baleen.llm import LLM
from baleen.messages import GenerateRequest, Grammar, SamplingParams, TokenLogprobs, TokenOutput, pack_ids
from baleen.model.random_checkpoint import build_random_checkpoint
from baleen.sampling import sampler
from tests.oracle import load_reference, random_prompts, save_model, teacher_forced

_BASE = random_prompts([150], 5)[0]
PROMPTS = [_BASE, _BASE[:130] + random_prompts([60], 6)[0], random_prompts([200], 7)[0], [5], _BASE[:64], _BASE[:65]]


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[Path, DeepseekV32ForCausalLM]]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), 4, num_hidden_layers=2)
        yield Path(folder), load_reference(Path(folder))


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    for index, (prompt, sampling) in enumerate(requests):
        outputs[str(index)] = []
        engine.add(GenerateRequest(rid=str(index), input_ids=pack_ids(prompt), sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            outputs[output.rid].append(output)
    return list(outputs.values())


def check(model: DeepseekV32ForCausalLM, prompt: list[int], first: int, got: tuple[TokenLogprobs | None, ...]) -> None:
    """The entries are those of positions first.. of the prompt, each with its two likeliest tokens."""
    exact = teacher_forced(model, prompt).log_softmax(dim=1)
    assert len(got) == len(prompt) - first
    for position, entry in enumerate(got, first):
        if position == 0:
            assert entry is None
            continue
        assert entry is not None
        row = exact[position - 1]
        assert entry.logprob == pytest.approx(row[prompt[position]].item(), abs=2e-4)
        assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=2e-4)
        assert [row[i].item() for i, _ in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=2e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"chunked_prefill_size": 64}, {"max_total_tokens": 6 * 64, "schedule_conservativeness": 0.01}],
    ids=["one chunk", "chunks", "few pages"],
)
@pytest.mark.parametrize("max_new_tokens", [0, 30])
def test_against_transformers(
    model: tuple[Path, DeepseekV32ForCausalLM],
    settings: dict[str, Any],
    max_new_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "_PROMPT_ELEMENTS", 320 * 37)  # 37 positions at a time
    folder, reference = model
    engine = Engine(default_config(folder, max_running_requests=4, **settings))
    firsts = [0, 100, 1, 0, 64, 64]
    before = 0
    for _ in range(2):  # the second time the cache has all of it
        requests = [
            (prompt, SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, logprobs=2, prompt_logprobs=first))
            for prompt, first in zip(PROMPTS, firsts)
        ]
        before = engine.stats().num_cached_tokens_total
        for (prompt, sampling), outputs in zip(requests, run(engine, requests)):
            assert sampling.prompt_logprobs is not None
            check(reference, prompt, sampling.prompt_logprobs, outputs[0].prompt_logprobs)
            assert not any(output.prompt_logprobs for output in outputs[1:])
            assert outputs[-1].finish_reason == "length"
            assert outputs[-1].num_output_tokens == max_new_tokens
    assert engine.stats().num_cached_tokens_total > before, "what is not scored may still be found"
    engine.close()


def test_scoring_an_output_gives_the_logprobs_it_was_sampled_with(
    model: tuple[Path, DeepseekV32ForCausalLM],
) -> None:
    engine = Engine(default_config(model[0]))
    sampling = SamplingParams(
        max_new_tokens=40, temperature=0.7, seed=3, ignore_eos=True, logprobs=0, logit_bias=((7, 3.0),)
    )
    (outputs,) = run(engine, [(PROMPTS[0], sampling)])
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    sampled = [entry.logprob for output in outputs for entry in output.logprobs]
    scoring = SamplingParams(max_new_tokens=0, logprobs=0, prompt_logprobs=len(PROMPTS[0]))
    ((scored,),) = run(engine, [(PROMPTS[0] + token_ids, scoring)])
    assert scored.num_cached_tokens == 128
    assert [entry.logprob for entry in scored.prompt_logprobs if entry] == pytest.approx(sampled, abs=2e-4)
    engine.close()


def test_min_new_tokens_and_logit_bias_in_the_engine(model: tuple[Path, DeepseekV32ForCausalLM]) -> None:
    """Biased to eos, a request ends with the first token, or with the first one after min_new_tokens."""
    engine = Engine(default_config(model[0]))
    eos = engine.scheduler._eos_token_ids
    bias = tuple((token_id, 100.0) for token_id in eos)
    params = [SamplingParams(max_new_tokens=20, logit_bias=bias, min_new_tokens=n, seed=n) for n in (0, 1, 7, 19, 20)]
    ended = [outputs[-1] for outputs in run(engine, [(PROMPTS[0], each) for each in params])]
    assert [output.num_output_tokens for output in ended] == [1, 2, 8, 20, 20]
    assert [output.finish_reason for output in ended] == ["stop", "stop", "stop", "stop", "length"]
    engine.close()


def test_a_running_timeout_ends_a_request_in_the_engine(model: tuple[Path, DeepseekV32ForCausalLM]) -> None:
    engine = Engine(default_config(model[0], request_running_timeout=0.05, request_waiting_timeout=30.0))
    sampling = SamplingParams(max_new_tokens=800, ignore_eos=True)
    (outputs,) = run(engine, [(PROMPTS[3], sampling)])
    assert (outputs[-1].finish_reason, outputs[-1].status) == ("abort", 503)
    assert outputs[-1].num_output_tokens < 800
    assert engine.stats().num_timeouts_total == 1
    assert engine.flush_cache().ok
    engine.close()


def test_llm_takes_the_fields(model: tuple[Path, DeepseekV32ForCausalLM]) -> None:
    folder, reference = model
    prompt = PROMPTS[0]
    with LLM(str(folder)) as llm:
        sampling = SamplingParams(
            temperature=0.0, max_new_tokens=9, min_new_tokens=4, logit_bias=((1, 100.0),), logprobs=2, prompt_logprobs=3
        )
        answer, alone = llm.generate([prompt, prompt], [sampling, SamplingParams(max_new_tokens=0, prompt_logprobs=0)])
        check(reference, prompt, 3, tuple(answer.prompt_logprobs))
        assert (len(answer.token_ids), answer.finish_reason, answer.stop) == (5, "stop", 1)
        assert len(answer.logprobs) == 5
        assert (alone.token_ids, alone.finish_reason, len(alone.prompt_logprobs)) == ([], "length", len(prompt))
        assert all(not entry.top for entry in alone.prompt_logprobs if entry)
        for wrong in ({"logit_bias": ((320, 1.0),)}, {"logit_bias": ((-1, 1.0),)}, {"prompt_logprobs": 151}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                llm.generate(prompt, SamplingParams(**wrong))


def test_llm_takes_grammars(tmp_path: Path) -> None:
    """Beside the other fields: a complete grammar ends the text before min_new_tokens, a bias picks what it allows."""
    with LLM(str(build_random_checkpoint(tmp_path / "tiny", size="tiny")), context_length=1024) as llm:
        (b,) = llm.tokenizer.encode("b")
        params = [
            SamplingParams(grammar=Grammar(kind="regex", text="ab"), min_new_tokens=20, logprobs=3),
            SamplingParams(grammar=Grammar(kind="regex", text="[a-c]{5}"), logit_bias=((b, 100.0),)),
            SamplingParams(grammar=Grammar(kind="regex", text="[0-9]{2,20}"), min_new_tokens=9, seed=1),
        ]
        short, biased, long = llm.generate(["hi"] * 3, params)
        assert (short.text, short.finish_reason, len(short.token_ids)) == ("ab", "stop", 3)
        assert all(math.isfinite(logprob) for entry in short.logprobs for _, logprob in entry.top)
        assert biased.text == "bbbbb"
        assert 9 <= len(long.text) <= 20
        with pytest.raises(ValueError, match="regex"):
            llm.generate("hi", SamplingParams(grammar=Grammar(kind="regex", text="a{")))
