"""/v1/chat/completions through the openai client, over real HTTP, with a scripted engine behind real sockets."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import openai
import pytest

from baleen.messages import GenerateRequest, unpack_ids
from baleen.server.conftest import CONTEXT, EOS_ID, Server, wait_until

HI = [{"role": "user", "content": "hi"}]
THINKING = {"chat_template_kwargs": {"thinking": True}}


def chat(server: Server, **fields: Any) -> Any:
    return server.openai().chat.completions.create(**({"model": "default", "messages": HI} | fields))


def test_answer_usage_and_prompt(server: Server) -> None:
    script = server.play("Hello, 世界 😀!")
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    answer = chat(server, messages=messages)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Hello, 世界 😀!",
        "stop",
    )
    assert choice.matched_stop == EOS_ID
    assert (answer.object, answer.model) == ("chat.completion", "tiny-whale")
    assert answer.id.startswith("chatcmpl-")
    prompt = server.tokenizer.encode("<｜begin▁of▁sentence｜>Be brief.<｜User｜>hi<｜Assistant｜></think>")
    assert unpack_ids(script.requests[0].input_ids) == prompt
    num_said = len(server.tokenizer.encode("Hello, 世界 😀!")) + 1  # and eos
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), num_said)
    assert usage.total_tokens == len(prompt) + num_said
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_stream_has_role_deltas_finish_and_usage(server: Server) -> None:
    server.play("Hello, 世界 😀!")
    whole = chat(server)
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    first, *deltas, finish, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(c.choices[0].delta.content for c in deltas) == "Hello, 世界 😀!"
    assert len(deltas) > 3
    assert all(c.choices[0].finish_reason is None and c.choices[0].delta.content for c in deltas)
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content) == ("stop", None)
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])


def test_stream_on_the_wire(server: Server) -> None:
    server.play("ab")
    with server.http() as http:
        response = http.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(e.startswith("data: ") for e in events[:-1])
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "matched_stop": None,
        }
    ]
    assert "usage" not in first


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_splits_reasoning_from_content(server: Server, stream: bool) -> None:
    script = server.play("I am thinking</think>Hello!")
    for toggle in (THINKING, {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"}):
        answer = chat(server, extra_body=toggle, stream=stream)
        if stream:
            deltas = [c.choices[0].delta for c in answer if c.choices]
            reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
            content = "".join(d.content or "" for d in deltas)
        else:
            message = answer.choices[0].message
            reasoning, content = message.reasoning_content, message.content
            to_tag = len(server.tokenizer.encode("I am thinking</think>"))
            assert answer.usage.completion_tokens_details.reasoning_tokens == to_tag
        assert (reasoning, content) == ("I am thinking", "Hello!")
        assert unpack_ids(script.requests[-1].input_ids)[-1] == server.tokenizer.encode("<think>")[0]


def test_without_thinking_tags_are_content(server: Server) -> None:
    script = server.play("a</think>b")
    for toggle in ({}, {"chat_template_kwargs": {"thinking": False, "enable_thinking": True}}):
        message = chat(server, extra_body=toggle).choices[0].message
        assert (message.content, message.reasoning_content) == ("a</think>b", None)
        assert unpack_ids(script.requests[-1].input_ids)[-1] == server.tokenizer.encode("</think>")[0]
    raw = chat(server, extra_body=THINKING | {"separate_reasoning": False}).choices[0].message
    assert raw.content == "a</think>b"


def test_thinking_cut_off_by_length_stays_reasoning(server: Server) -> None:
    server.play("still thinking", per_step=3)
    answer = chat(server, extra_body=THINKING, max_tokens=4)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4
    choice = answer.choices[0]
    said = server.tokenizer.encode("still thinking")[:4]
    assert choice.message.reasoning_content == b"".join(map(server.tokenizer.token_bytes, said)).decode()
    assert (choice.message.content, choice.finish_reason) == ("", "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_step", [1, 3, 50])
def test_stop_strings_end_and_abort(server: Server, stream: bool, per_step: int) -> None:
    script = server.play("one two XYZ three four five" * 3, per_step=per_step, pause=0.005)
    answer = chat(server, stop=["nothing", " XYZ"], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        choice = chunks[-1].choices[0]
    else:
        choice = answer.choices[0]
        text = choice.message.content
        letters = server.tokenizer.encode("one two XYZ three four five" * 3)
        seen = next(
            n for n in range(len(letters)) if b" XYZ" in b"".join(map(server.tokenizer.token_bytes, letters[:n]))
        )
        assert answer.usage.completion_tokens == seen
    assert text == "one two"
    assert (choice.finish_reason, choice.matched_stop) == ("stop", " XYZ")
    if per_step < 50:
        wait_until(lambda: script.aborted == [script.requests[0].rid])


def test_stop_token_ids_and_ignore_eos(server: Server) -> None:
    reply = server.tokenizer.encode("abcde")
    script = server.play(reply=reply)
    choice = chat(server, extra_body={"stop_token_ids": [reply[2]]}).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.matched_stop) == ("ab", "stop", reply[2])
    script = server.play(reply=[reply[0], EOS_ID, reply[1]])
    body = {"ignore_eos": True, "stop_token_ids": [reply[1]]}
    choice = chat(server, extra_body=body, max_tokens=3).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.matched_stop) == ("ab", "length", None)
    shown = chat(server, extra_body=body | {"skip_special_tokens": False}, max_tokens=3).choices[0]
    assert shown.message.content == "a<｜end▁of▁sentence｜>b"
    assert script.requests[0].sampling.ignore_eos


def test_n_choices_have_their_own_seeds(server: Server) -> None:
    def reply(request: GenerateRequest) -> list[int]:
        return server.tokenizer.encode(f"answer {request.sampling.seed}")

    script = server.play(reply=reply)
    answer = chat(server, n=3, seed=40)
    assert [(c.index, c.message.content) for c in answer.choices] == [
        (0, "answer 40"),
        (1, "answer 41"),
        (2, "answer 42"),
    ]
    assert answer.usage.prompt_tokens == len(unpack_ids(script.requests[0].input_ids))
    texts = ["", "", ""]
    for chunk in chat(server, n=3, seed=2**63 - 1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [f"answer {2**63 - 1}", "answer 0", "answer 1"]
    script = server.play("x")
    chat(server, n=4)
    seeds = {r.sampling.seed for r in script.requests}
    assert len(seeds) == 4
    assert all(0 <= s < 2**63 for s in seeds)


def test_sampling_fields_reach_the_engine(server: Server) -> None:
    script = server.play("x")
    chat(
        server,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.2,
        max_completion_tokens=7,
        max_tokens=9,
        stop="zz",
        extra_body={"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [9]},
    )
    s = script.requests[0].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.5, 0.9, 5, 0.05)
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (0.1, -0.2, 1.1)
    assert (s.max_new_tokens, s.stop, s.stop_token_ids, s.logprobs) == (7, ("zz",), (9,), None)
    chat(server, temperature=1e-9)
    s = script.requests[1].sampling
    assert (s.temperature, s.top_p, s.top_k) == (0.0, 1.0, -1)
    assert s.max_new_tokens == CONTEXT - len(unpack_ids(script.requests[1].input_ids))  # to the end of the context


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_every_token(server: Server, stream: bool) -> None:
    script = server.play("a 世 b STOP", per_step=2)
    answer = chat(server, logprobs=True, top_logprobs=2, stop="STOP", stream=stream)
    if stream:
        with_logprobs = [c.choices[0].logprobs.content for c in answer if c.choices[0].logprobs]
        entries = list(itertools.chain(*with_logprobs))
    else:
        entries = answer.choices[0].logprobs.content
    ids = server.tokenizer.encode("a 世 b STOP")
    assert [bytes(e.bytes) for e in entries] == [server.tokenizer.token_bytes(i) for i in ids]
    assert b"".join(bytes(e.bytes) for e in entries).decode() == "a 世 b STOP"
    assert all(e.logprob == -0.5 for e in entries)
    assert [[t.logprob for t in e.top_logprobs] for e in entries] == [[-0.5, -1.5]] * len(ids)
    assert script.requests[0].sampling.logprobs == 2


def test_logprobs_without_top(server: Server) -> None:
    script = server.play("ab")
    assert chat(server, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(server).choices[0].logprobs is None
    assert [r.sampling.logprobs for r in script.requests] == [0, None]


def test_32_streams_at_once(server: Server) -> None:
    def reply(request: GenerateRequest) -> list[int]:
        return server.tokenizer.encode(f"stream {request.sampling.seed} " * 10)

    server.play(reply=reply, pause=0.001)
    texts: dict[int, str] = {}

    def read(seed: int) -> None:
        parts = [c.choices[0].delta.content or "" for c in chat(server, seed=seed, stream=True)]
        texts[seed] = "".join(parts)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == {seed: f"stream {seed} " * 10 for seed in range(32)}
    assert server.client.num_open == 0


def test_engine_error_before_and_during_the_answer(server: Server) -> None:
    server.play("abcdef", fail_after=0)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            chat(server, stream=stream)
        assert caught.value.status_code == 500
        assert caught.value.body == {
            "message": "the logits held NaN",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }
    server.play("abcdef", fail_after=3)
    with pytest.raises(openai.APIError, match="the logits held NaN"):
        list(chat(server, stream=True))
    with server.http() as http:
        events = http.post("/v1/chat/completions", json={"messages": HI, "stream": True}).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["message"] == "the logits held NaN"
    assert events[-2] == "data: [DONE]"


def test_an_error_of_one_choice_aborts_the_others(server: Server) -> None:
    script = server.play("abcdef" * 9, fail_after=3, pause=0.002)
    with pytest.raises(openai.InternalServerError):
        chat(server, n=3)
    wait_until(lambda: len(script.aborted) >= 1 or server.client.num_open == 0)
    assert server.client.num_open == 0
