"""/v1/completions through the openai client."""

from __future__ import annotations

from typing import Any

import pytest

from baleen.messages import GenerateRequest, Grammar, unpack_ids
from baleen.server.conftest import CONTEXT, EOS_ID, Server


def complete(server: Server, **fields: Any) -> Any:
    return server.openai().completions.create(**({"model": "tiny-whale"} | fields))


def echo_reversed(request: GenerateRequest) -> list[int]:
    return unpack_ids(request.input_ids)[::-1]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["cba"]),
        (["abc", "xy"], ["cba", "yx"]),
        ("ids", ["cba"]),
        ("list of ids", ["cba", "yx"]),
    ],
)
def test_every_form_of_prompt(server: Server, prompt: Any, texts: list[str]) -> None:
    server.play(reply=echo_reversed)
    encode = server.tokenizer.encode
    prompt = {"ids": encode("abc"), "list of ids": [encode("abc"), encode("xy")]}.get(str(prompt), prompt)
    answer = complete(server, prompt=prompt)
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts))
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    num_prompt = sum(map(len, texts))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, num_prompt + len(texts))


def test_prompt_is_encoded_as_it_is(server: Server) -> None:
    script = server.play("x")
    complete(server, prompt="hello")
    assert unpack_ids(script.requests[0].input_ids) == server.tokenizer.encode("hello")


def test_choices_are_prompt_major_and_seeds_repeat_per_prompt(server: Server) -> None:
    script = server.play(reply=echo_reversed)
    answer = complete(server, prompt=["ab", "cd"], n=2, seed=5)
    assert [c.text for c in answer.choices] == ["ba", "ba", "dc", "dc"]
    assert [r.sampling.seed for r in script.requests] == [5, 6, 5, 6]


def test_default_limits(server: Server) -> None:
    script = server.play("x" * 100)
    answer = complete(server, prompt="a")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    ids = [7] * (CONTEXT - 5)
    assert complete(server, prompt=ids).usage.completion_tokens == 5  # what still fits
    assert [r.sampling.temperature for r in script.requests] == [1.0, 1.0]


def test_stream_finishes_with_the_last_text(server: Server) -> None:
    server.play("Hello 世界")
    chunks = list(complete(server, prompt="a", stream=True, stream_options={"include_usage": True}))
    *texts, last = chunks
    assert "".join(c.choices[0].text for c in texts) == "Hello 世界"
    assert [c.choices[0].finish_reason for c in texts] == [None] * (len(texts) - 1) + ["stop"]
    assert texts[-1].choices[0].matched_stop == EOS_ID
    assert last.choices == []
    assert last.usage.completion_tokens == len(server.tokenizer.encode("Hello 世界")) + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_step", [1, 2])
def test_logprobs_and_offsets(server: Server, stream: bool, per_step: int) -> None:
    server.play("the 🦊 quick", per_step=per_step)
    answer = complete(server, prompt="a", logprobs=2, stream=stream)
    parts = [c.choices[0] for c in answer] if stream else answer.choices
    tokens = [t for part in parts for t in part.logprobs.tokens]
    offsets = [o for part in parts for o in part.logprobs.text_offset]
    tops = [t for part in parts for t in part.logprobs.top_logprobs]
    text = "".join(part.text for part in parts)
    assert text == "the 🦊 quick"
    ids = server.tokenizer.encode(text)
    assert len(tokens) == len(offsets) == len(tops) == len(ids) + 1
    for token, offset in zip(tokens[:-1], offsets):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in tokens)  # the character that takes several tokens
    assert all(len(top) >= 2 and top[token] == -0.5 for token, top in zip(tokens, tops))
    assert [lp for part in parts for lp in part.logprobs.token_logprobs] == [-0.5] * len(tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_echo_puts_the_prompt_before_the_answer(server: Server, stream: bool, form: str) -> None:
    script = server.play(" and 🦊")
    prompt = "é🦊<｜User｜>the"  # special tokens too
    given = prompt if form == "text" else server.tokenizer.encode(prompt)
    answer = complete(server, prompt=given, echo=True, logprobs=1, stream=stream)
    parts = [c.choices[0] for c in answer] if stream else answer.choices
    assert "".join(part.text for part in parts) == prompt + " and 🦊"
    tokens = [t for part in parts for t in part.logprobs.tokens]
    offsets = [o for part in parts for o in part.logprobs.text_offset]
    logprobs = [lp for part in parts for lp in part.logprobs.token_logprobs]
    tops = [top for part in parts for top in part.logprobs.top_logprobs]
    num = len(server.tokenizer.encode(prompt))
    said = len(server.tokenizer.encode(" and 🦊")) + 1
    assert len(tokens) == len(offsets) == len(logprobs) == len(tops) == num + said
    assert logprobs == [None, *(-i / 8 for i in range(1, num)), *[-0.5] * said]
    assert tops[0] is None
    assert tops[1][tokens[1]] == -1 / 8
    whole = prompt + " and 🦊"
    for token, offset in zip(tokens[:-1], offsets):
        assert token.startswith("bytes:") or whole[offset:].startswith(token)
    assert script.requests[0].sampling.prompt_logprobs == 0


def test_echo_without_logprobs(server: Server) -> None:
    script = server.play(reply=echo_reversed)
    answer = complete(server, prompt=["ab", "cd"], echo=True, n=2)
    assert [c.text for c in answer.choices] == ["abba", "abba", "cddc", "cddc"]
    assert script.requests[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_text_generates_nothing(server: Server, stream: bool) -> None:
    """As lm-eval does it."""
    server.play("x")
    answer = complete(server, prompt="abc", echo=True, logprobs=1, max_tokens=0, stream=stream)
    parts = [c.choices[0] for c in answer] if stream else answer.choices
    assert "".join(part.text for part in parts) == "abc"
    assert parts[-1].finish_reason == "length"
    assert [lp for part in parts for lp in part.logprobs.token_logprobs] == [None, -1 / 8, -2 / 8]
    if not stream:
        assert answer.usage.completion_tokens == 0


def test_constraints_and_extensions_reach_the_engine(server: Server) -> None:
    script = server.play("ab12")
    body = {"json_schema": '{"const": 1}', "min_tokens": 2, "ignore_eos": True, "stop_regex": "[0-9]", "best_of": 1}
    answer = complete(server, prompt="a", logit_bias={"7": 1.5}, extra_body=body, seed=3)
    assert (answer.choices[0].text, answer.choices[0].matched_stop) == ("ab", "[0-9]")
    s = script.requests[0].sampling
    assert s.grammar == Grammar(kind="json_schema", text='{"const": 1}')
    assert (s.min_new_tokens, s.ignore_eos, s.logit_bias, s.seed) == (2, True, ((7, 1.5),), 3)
    complete(server, prompt="a", extra_body={"response_format": {"type": "json_object"}})
    assert script.requests[1].sampling.grammar == Grammar(kind="json_schema", text='{"type": "object"}')


def test_meta_info_ids_and_running_usage(server: Server) -> None:
    script = server.play("ab")
    extra = {"return_meta_info": True, "return_prompt_token_ids": True, "rid": "whale"}
    answer = complete(server, prompt=["a", "b"], extra_body=extra)
    assert answer.id == "whale"
    assert [c.prompt_token_ids for c in answer.choices] == [unpack_ids(r.input_ids) for r in script.requests]
    assert [c.meta_info["finish_reason"]["type"] for c in answer.choices] == ["stop", "stop"]
    options = {"continuous_usage_stats": True}
    chunks = list(complete(server, prompt="a", stream=True, extra_body={"stream_options": options}))
    assert all(c.usage.prompt_tokens == 1 for c in chunks)
    assert chunks[-1].usage.completion_tokens == 3
