"""Tool calls through /v1/chat/completions: what the model says comes back as calls, streamed and not; what the client
says of tools reaches the prompt and the grammar.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from baleen.messages import Grammar, unpack_ids
from baleen.server.conftest import EOS_ID, Server

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
D = "｜DSML｜"
CALLS = (
    f"\n\n<{D}function_calls>\n"
    f'<{D}invoke name="get_weather">\n<{D}parameter name="city" string="true">Oslo</{D}parameter>\n'
    f'<{D}parameter name="days" string="false">3</{D}parameter>\n</{D}invoke>\n'
    f'<{D}invoke name="get_time">\n</{D}invoke>\n</{D}function_calls>'
)


@dataclass
class Answer:
    """Streamed or not, in one form; calls as (id, name, arguments) by index."""

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    matched_stop: Any = None
    calls: dict[int, list[str]] | None = None


def ask(server: Server, *, stream: bool, **fields: Any) -> Answer:
    extra = fields.pop("extra_body", {})
    answer = server.openai().chat.completions.create(
        **(
            {"model": "default", "messages": HI, "tools": [WEATHER, TIME], "stream": stream, "extra_body": extra}
            | fields
        )
    )
    result = Answer(calls={})
    assert result.calls is not None
    if not stream:
        choice = answer.choices[0]
        message = choice.message
        assert message.reasoning_content == message.reasoning
        result.content, result.reasoning = message.content, message.reasoning or ""
        result.finish_reason, result.matched_stop = choice.finish_reason, choice.matched_stop
        for at, call in enumerate(message.tool_calls or ()):
            assert (call.type, call.index) == ("function", at)
            result.calls[at] = [call.id, call.function.name, call.function.arguments]
        return result
    for chunk in answer:
        choice = chunk.choices[0]
        delta = choice.delta
        assert result.finish_reason is None, "the finish_reason comes last"
        result.content += delta.content or ""
        result.reasoning += getattr(delta, "reasoning", None) or ""
        assert getattr(delta, "reasoning_content", None) == getattr(delta, "reasoning", None)
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert (call.type, call.function.arguments) == ("function", "")
                assert call.index == len(result.calls)
                result.calls[call.index] = [call.id, call.function.name, ""]
            else:
                assert call.function.name is None
                result.calls[call.index][2] += call.function.arguments
        if choice.finish_reason is not None:
            assert not delta.model_dump(exclude_none=True), "an event of its own"
            result.finish_reason, result.matched_stop = choice.finish_reason, choice.matched_stop
    return result


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_step", [1, 3, 500])
def test_parallel_calls_after_reasoning_and_text(agent: Server, stream: bool, per_step: int) -> None:
    agent.play("I need both</think>Looking." + CALLS, per_step=per_step)
    answer = ask(agent, stream=stream, extra_body={"thinking": {"type": "enabled"}})
    assert (answer.reasoning, answer.content) == ("I need both", "Looking.")
    assert (answer.finish_reason, answer.matched_stop) == ("tool_calls", None)
    assert answer.calls is not None
    assert [name for _, name, _ in answer.calls.values()] == ["get_weather", "get_time"]
    assert [json.loads(arguments) for *_, arguments in answer.calls.values()] == [{"city": "Oslo", "days": 3}, {}]
    ids = [call_id for call_id, *_ in answer.calls.values()]
    assert len(set(ids)) == 2
    assert all(len(i) == 29 and i.startswith("call_") and int(i[5:], 16) >= 0 for i in ids)


def test_ids_are_those_of_the_request_streamed_or_not(agent: Server) -> None:
    agent.play(CALLS)
    whole, streamed, other = (
        ask(agent, stream=stream, extra_body={"rid": rid}).calls
        for stream, rid in ((False, "one"), (True, "one"), (False, "two"))
    )
    assert whole == streamed
    assert whole is not None
    assert other is not None
    assert not {i for i, *_ in whole.values()} & {i for i, *_ in other.values()}


def test_content_beside_calls_is_empty_not_null(agent: Server) -> None:
    agent.play(CALLS)
    with agent.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HI, "tools": [WEATHER, TIME]}).json()
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("", None, None)
    assert message["tool_calls"][1] == {
        "index": 1,
        "id": message["tool_calls"][1]["id"],
        "type": "function",
        "function": {"name": "get_time", "arguments": "{}"},
    }
    agent.play("no call")
    with agent.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HI, "tools": [WEATHER]}).json()
    assert answer["choices"][0]["message"]["tool_calls"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_keeps_length(agent: Server, stream: bool) -> None:
    script = agent.play(CALLS)
    num = len(agent.tokenizer.encode(CALLS[: CALLS.index("Oslo") + 2]))
    answer = ask(agent, stream=stream, max_tokens=num)
    assert answer.finish_reason == "length"
    assert answer.calls is not None
    assert answer.calls[0][1:] == ["get_weather", '{"city": "Os']
    assert script.requests[0].sampling.max_new_tokens == num


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_is_no_call_comes_back_as_content(agent: Server, stream: bool) -> None:
    broken = f'<{D}function_calls>\n<{D}invoke name="unknown">\n</{D}invoke>\n</{D}function_calls>'
    agent.play(broken)
    answer = ask(agent, stream=stream)
    assert (answer.calls, answer.finish_reason, answer.matched_stop) == ({}, "stop", EOS_ID)
    assert 'invoke name="unknown"' in answer.content


@pytest.mark.parametrize("stream", [False, True])
def test_without_callable_tools_marks_are_text(agent: Server, stream: bool) -> None:
    """No tools, or tool_choice none: then the tools are in the prompt, and the tokens of calls cannot be chosen."""
    script = agent.play(CALLS)
    for fields in ({"tools": []}, {"tool_choice": "none"}):
        answer = ask(agent, stream=stream, **fields)
        assert (answer.content, answer.calls, answer.finish_reason) == (CALLS, {}, "stop")
    marks = agent.tokenizer.mark_ids
    assert len(marks) >= 6
    assert script.requests[0].sampling.logit_bias == ()
    assert script.requests[1].sampling.logit_bias == tuple((i, -100.0) for i in sorted(marks))
    prompts = [len(unpack_ids(request.input_ids)) for request in script.requests]
    assert prompts[1] > prompts[0] + 100


NAMED = {"type": "function", "function": {"name": "get_time"}}
STRICT = WEATHER | {"function": WEATHER["function"] | {"strict": True}}


@pytest.mark.parametrize(
    ("fields", "choice", "parallel", "names"),
    [
        ({}, None, True, []),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, None, True, []),
        ({"tool_choice": "required"}, "required", True, ["get_weather", "get_time"]),
        ({"tool_choice": NAMED}, NAMED, True, ["get_time"]),
        ({"parallel_tool_calls": False}, "auto", False, ["get_weather", "get_time"]),
        ({"tools": [STRICT, TIME]}, "auto", True, ["get_weather", "get_time"]),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}},
            "auto",
            True,
            ["get_time"],
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
            "required",
            True,
            ["get_time"],
        ),
    ],
)
def test_the_grammar_says_what_may_be_called(
    agent: Server, fields: dict[str, Any], choice: Any, parallel: bool, names: list[str]
) -> None:
    script = agent.play("x")
    ask(agent, stream=False, **fields)
    grammar = script.requests[0].sampling.grammar
    if choice is None:
        assert grammar is None
        return
    assert grammar is not None
    assert (grammar.kind, grammar.starts_after) == ("tools", None)
    said = json.loads(grammar.text)
    assert (said["format"], said["tool_choice"], said["parallel_tool_calls"]) == ("deepseekv32", choice, parallel)
    assert [tool["function"]["name"] for tool in said["tools"]] == names


def test_only_allowed_tools_are_calls(agent: Server) -> None:
    agent.play(CALLS)
    answer = ask(agent, stream=False, tool_choice=NAMED)
    assert answer.calls is not None
    assert [name for _, name, _ in answer.calls.values()] == ["get_time"]
    assert "Oslo" in answer.content


def test_tools_of_a_message_are_offered_too(agent: Server) -> None:
    script = agent.play(CALLS)
    messages = [{"role": "system", "content": "Be brief.", "tools": [WEATHER, TIME]}, *HI]
    answer = ask(agent, stream=False, messages=messages, tools=[], tool_choice="required")
    assert answer.calls is not None
    assert len(answer.calls) == 2
    grammar = script.requests[0].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.text)["tools"] == [WEATHER, TIME]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"regex": "a+"}, Grammar(kind="regex", text="a+")),
        ({"ebnf": "root ::= 'a'"}, Grammar(kind="ebnf", text="root ::= 'a'")),
        ({"json_schema": '{"type": "string"}'}, Grammar(kind="json_schema", text='{"type": "string"}')),
        ({"json_schema": {"type": "string"}}, Grammar(kind="json_schema", text='{"type": "string"}')),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_schema", text='{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": "é"}}}},
            Grammar(kind="json_schema", text='{"const": "é"}'),
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {"const": 1}}},
            Grammar(kind="json_schema", text='{"const": 1}'),
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
            Grammar(kind="structural_tag", text='{"type": "structural_tag", "format": {"type": "any_text"}}'),
        ),
        (
            {"structural_tag": {"structures": [{"begin": "<a>", "schema": {"type": "null"}, "end": "</a>"}],
                                "triggers": ["<a"]}},
            Grammar(
                kind="structural_tag",
                text='{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<a"], "tags": '
                '[{"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": {"type": "null"}}, '
                '"end": "</a>"}]}}',
            ),
        ),
    ],
)  # fmt: skip
def test_constraints_reach_the_engine(
    agent: Server, fields: dict[str, Any], grammar: Grammar | None, thinking: bool
) -> None:
    script = agent.play("x")
    body = fields | {"thinking": thinking}
    ask(agent, stream=False, tools=[WEATHER], tool_choice="none", extra_body=body)
    got = script.requests[0].sampling.grammar
    if grammar is None:
        assert got is None
        return
    assert got is not None
    assert (got.kind, got.text) == (grammar.kind, grammar.text)
    assert got.starts_after == (agent.tokenizer.think_end_id if thinking else None)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_json_answer_or_calls(agent: Server, thinking: bool) -> None:
    """Agents send both: the model may call, and its last answer is in the schema."""
    script = agent.play("x")
    schema = {"type": "object", "properties": {"whale": {"type": "string"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for choice in ("auto", "required"):
        body = {"thinking": thinking}
        ask(agent, stream=False, tools=[WEATHER], tool_choice=choice, response_format=asked, extra_body=body)
        got = script.requests[-1].sampling.grammar
        assert got is not None
        assert got.kind == "tools"
        assert json.loads(got.text).get("answer_schema") == (schema if choice == "auto" else None)
        assert got.starts_after == (agent.tokenizer.think_end_id if thinking else None)


def test_the_schema_of_response_format_stands_in_the_prompt(agent: Server) -> None:
    script = agent.play("x")
    schema = {"type": "object", "properties": {"whale": {"type": "string"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    ask(agent, stream=False, tools=[], response_format=asked)
    prompt = b"".join(map(agent.tokenizer.token_bytes, unpack_ids(script.requests[0].input_ids))).decode()
    assert json.dumps(schema) in prompt
