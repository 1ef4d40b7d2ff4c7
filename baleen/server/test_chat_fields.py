"""Fields of /v1/chat/completions beyond the plain ones: thinking, logit_bias, stops, priority, running usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baleen.messages import unpack_ids
from baleen.server.conftest import EOS_ID, Server, running_server
from baleen.server.protocol import ChatRequest
from baleen.server.test_bad_requests import HI, TOOL, error_of
from baleen.server.test_chat_completions import chat

THINK = {"thinking": True}


def post(server: Server, **body: Any) -> Any:
    with server.http() as http:
        response = http.post("/v1/chat/completions", json={"messages": HI} | body)
    assert response.status_code == 200, response.text
    return response.json()


def deltas(server: Server, **body: Any) -> list[dict[str, Any]]:
    with server.http() as http:
        response = http.post("/v1/chat/completions", json={"messages": HI, "stream": True} | body)
    assert response.status_code == 200, response.text
    events = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n")[:-2]]
    return [event["choices"][0]["delta"] for event in events if event["choices"]]


@pytest.mark.parametrize(
    ("body", "thinks"),
    [
        ({}, False),
        ({"thinking": True}, True),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": {"enable": True}}, True),
        ({"reasoning": {"effort": "low"}}, True),
        ({"reasoning": {"reasoning_effort": "low"}}, True),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": 0.5}, True),
        ({"chat_template_kwargs": {"thinking": None, "enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, True),
        # contradictions: the earlier field of the documented list wins
        ({"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, True),
        ({"chat_template_kwargs": {"thinking": False, "enable_thinking": True}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "thinking": True}, False),
        ({"thinking": False, "reasoning": {"enabled": True}, "reasoning_effort": "high"}, False),
        ({"reasoning": {"enabled": False, "effort": "high"}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"reasoning_effort": "none"}, "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "none", "reasoning": {"effort": "high"}}, False),
    ],
)
def test_one_decision_about_thinking(server: Server, body: dict[str, Any], thinks: bool) -> None:
    """The prompt and the parser follow the same one."""
    assert ChatRequest.model_validate({"messages": HI} | body).wants_thinking is thinks
    script = server.play("a</think>b")
    message = post(server, **body)["choices"][0]["message"]
    last = unpack_ids(script.requests[0].input_ids)[-1]
    assert server.tokenizer.token_text(last) == ("<think>" if thinks else "</think>")
    assert message["content"] == ("b" if thinks else "a</think>b")
    assert message["reasoning"] == message["reasoning_content"] == ("a" if thinks else None)


def test_streamed_reasoning_has_both_names(server: Server) -> None:
    server.play("ab</think>c")
    parts = deltas(server, **THINK)
    assert parts[1:] == [
        {"reasoning_content": "a", "reasoning": "a"},
        {"reasoning_content": "b", "reasoning": "b"},
        {"content": "c"},
        {},
    ]


@pytest.mark.parametrize("text", ["think</think>answer", "think</think>", "think"])
def test_reasoning_in_one_piece(server: Server, text: str) -> None:
    server.play(text)
    parts = deltas(server, stream_reasoning=False, **THINK)
    assert parts[1] == {"reasoning_content": "think", "reasoning": "think"}
    assert "".join(part.get("content", "") for part in parts) == text.partition("</think>")[2]
    assert sum("reasoning" in part for part in parts) == 1


@pytest.mark.parametrize("body", [{"include_reasoning": False}, {"reasoning": {"exclude": True, "enabled": True}}])
def test_reasoning_left_out(server: Server, body: dict[str, Any]) -> None:
    server.play("think</think>answer")
    answer = post(server, **THINK, **body)
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("answer", None, None)
    assert answer["usage"]["reasoning_tokens"] == len(server.tokenizer.encode("think</think>"))
    parts = deltas(server, **THINK, **body)
    assert not any("reasoning" in part or "reasoning_content" in part for part in parts)
    assert "".join(part.get("content", "") for part in parts) == "answer"


@pytest.mark.parametrize("per_step", [1, 2, 5, 50])
@pytest.mark.parametrize("body", [{}, {"separate_reasoning": False}])
def test_reasoning_tokens_are_counted_to_the_tag(server: Server, body: dict[str, Any], per_step: int) -> None:
    server.play("five words of deep thought</think>and an answer", per_step=per_step)
    usage = post(server, **THINK, **body)["usage"]
    expected = len(server.tokenizer.encode("five words of deep thought")) + 1
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["reasoning_tokens"] == expected
    assert post(server)["usage"]["reasoning_tokens"] == 0


def test_usage_while_streaming(server: Server) -> None:
    server.play("a</think>bc")
    chunks = list(
        chat(
            server,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            extra_body=THINK,
        )
    )
    role, *texts, finish, last = chunks
    assert role.usage is None
    assert finish.usage is None
    counts = [c.usage.completion_tokens for c in texts]  # at least what is shown: a late reader gets several steps
    assert counts == sorted(counts)
    assert all(least <= count <= 5 for least, count in zip([1, 3, 4], counts, strict=True))
    assert texts[-1].usage.completion_tokens_details.reasoning_tokens == 2
    assert all(c.usage.total_tokens == c.usage.prompt_tokens + c.usage.completion_tokens for c in texts)
    assert (last.choices, last.usage.completion_tokens) == ([], 5)


def test_what_the_engine_is_told(server: Server) -> None:
    script = server.play("x")
    post(server, logit_bias={"9": -2.5, "4": 100}, min_tokens=3, max_tokens=5, seed=11)
    s = script.requests[0].sampling
    assert s.logit_bias == ((4, 100.0), (9, -2.5))
    assert (s.min_new_tokens, s.max_new_tokens, s.seed, s.grammar, s.prompt_logprobs) == (3, 5, 11, None, None)
    assert script.requests[0].priority == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("no_trim", "text"), [(False, "ab"), (True, "ab12")])
def test_stop_regex(server: Server, stream: bool, no_trim: bool, text: str) -> None:
    server.play("ab12 cd")
    body = {"stop_regex": "[0-9]{2}", "no_stop_trim": no_trim}
    answer = chat(server, stream=stream, extra_body=body)
    if stream:
        chunks = list(answer)
        said = "".join(c.choices[0].delta.content or "" for c in chunks)
        choice = chunks[-1].choices[0]
    else:
        choice = answer.choices[0]
        said = choice.message.content
    assert (said, choice.finish_reason, choice.matched_stop) == (text, "stop", "[0-9]{2}")


def test_a_stop_regex_that_takes_forever_ends_its_own_request(server: Server) -> None:
    script = server.play("a" * 40 + "!", per_step=50)
    with server.http() as http:
        error = error_of(http.post("/v1/chat/completions", json={"messages": HI, "stop_regex": "(a|a)*(a|a)*b$"}), 400)
    assert error["param"] == "stop_regex"
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"regex": "("}, "regex"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"tools": [TOOL], "parallel_tool_calls": False}, "tools"),
        ("/v1/completions", {"prompt": "a", "json_schema": "{}"}, "json_schema"),
        ("/generate", {"text": "a", "sampling_params": {"ebnf": "x"}}, "sampling_params.ebnf"),
        ("/generate", {"text": ["a"], "sampling_params": [{"ebnf": "x"}]}, "sampling_params[0].ebnf"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_does_not_compile_names_its_field(
    agent: Server, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    kind = param.rpartition(".")[2]
    agent.play("x", fail_after=0, refusal=f"{kind}: at /properties/a: no such type")
    with agent.http() as http:
        error = error_of(http.post(path, json={"messages": HI, "stream": stream} | body), 400)
    assert (error["param"], error["code"]) == (param, "invalid_grammar")
    assert error["message"] == f"{param}: at /properties/a: no such type"


def test_a_name_in_use_is_no_fault_of_the_grammar(server: Server) -> None:
    server.play("x", fail_after=0, refusal="rid: 'a' is that of an open request")
    with server.http() as http:
        error = error_of(http.post("/v1/chat/completions", json={"messages": HI, "rid": "a", "regex": "a"}), 400)
    assert error["param"] == "rid"
    assert error["message"] == "rid: 'a' is that of an open request"


def test_input_ids_are_the_prompt(server: Server) -> None:
    script = server.play("a</think>b")
    ids = server.tokenizer.encode("anything at all")
    message = post(server, input_ids=ids)["choices"][0]["message"]
    assert unpack_ids(script.requests[0].input_ids) == ids
    assert (message["content"], message["reasoning"]) == ("a</think>b", None)
    thinks = server.tokenizer.encode("anything<think>")
    message = post(server, input_ids=thinks)["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("b", "a")


def test_the_last_message_is_continued(server: Server) -> None:
    script = server.play("x")
    post(server, messages=[*HI, {"role": "assistant", "content": "Well,"}], continue_final_message=True)
    prompt = b"".join(map(server.tokenizer.token_bytes, unpack_ids(script.requests[0].input_ids))).decode()
    assert prompt.endswith("</think>Well,")


def test_prompt_ids_and_meta_info_with_each_choice(server: Server) -> None:
    script = server.play("ab")
    answer = post(server, n=2, return_prompt_token_ids=True, return_meta_info=True, rid="whale")
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == unpack_ids(script.requests[0].input_ids)
        meta = choice["meta_info"]
        assert (meta["id"], meta["completion_tokens"], meta["cached_tokens"]) == ("whale", 3, 3)
        assert meta["finish_reason"] == {"type": "stop", "matched": EOS_ID}
    assert answer["id"] == "whale"
    assert [request.rid for request in script.requests] == ["whale_0", "whale_1"]
    plain = post(server)["choices"][0]
    assert "meta_info" not in plain
    assert "prompt_token_ids" not in plain


def test_max_tokens_zero_says_nothing(server: Server) -> None:
    script = server.play("ab")
    choice = post(server, max_tokens=0)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert script.requests[0].sampling.max_new_tokens == 0


def test_priority_where_it_is_on(tmp_path: Path) -> None:
    with running_server(tmp_path, enable_priority_scheduling=True) as server:
        script = server.play("x")
        for priority in (3, -2, None):
            post(server, priority=priority)
        with server.http() as http:
            assert http.post("/generate", json={"text": "a", "priority": 4}).status_code == 200
            assert http.post("/v1/completions", json={"prompt": "a", "priority": 5}).status_code == 200
        assert [request.priority for request in script.requests] == [3, -2, 0, 4, 5]


def test_without_a_tool_parser_tools_are_refused(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    settings = {"tool_call_parser": "none", "reasoning_parser": "none", "context_length": 4096}
    with running_server(tmp_path, **settings) as server, server.http() as http:
        error = error_of(http.post("/v1/chat/completions", json={"messages": HI, "tools": [tool]}), 400)
        assert error["param"] == "tools"
        assert "--tool-call-parser" in error["message"]
        server.play("a</think>b")
        answer = post(server, tools=[tool], tool_choice="none", **THINK)
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("a</think>b", None)
    assert answer["usage"]["reasoning_tokens"] == 2
