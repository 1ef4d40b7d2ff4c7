"""/v1/messages through the anthropic client, over real HTTP, with a scripted engine behind real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent

from baleen.messages import GenerateRequest, unpack_ids
from baleen.server.conftest import CONTEXT, Script, Server, running_server, wait_until

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
CALL = (
    f'<{D}function_calls>\n<{D}invoke name="add">\n<{D}parameter name="a" string="false">1</{D}parameter>\n'
    f'<{D}parameter name="b" string="true">x "y"\n</{D}parameter>\n</{D}invoke>\n</{D}function_calls>'
)
ADD = {"name": "add", "description": "Adds", "input_schema": {"type": "object", "properties": {}}}
THINK = {"thinking": {"type": "adaptive"}}
HI = {"role": "user", "content": "hi"}


def client(server: Server, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**({"base_url": server.url, "api_key": "x", "max_retries": 0, "timeout": 20} | options))


def create(server: Server, **fields: Any) -> Any:
    defaults = {"model": "tiny-whale", "max_tokens": 2000, "messages": [HI]}
    return client(server).messages.create(**(defaults | fields))


def post(server: Server, body: dict[str, Any], path: str = "/v1/messages") -> httpx.Response:
    defaults = {"model": "tiny-whale", "max_tokens": 2000, "messages": [HI]}
    with server.http() as http:
        return http.post(path, json={k: v for k, v in (defaults | body).items() if v is not ...})


def refusal(server: Server, body: dict[str, Any]) -> str:
    """The message of the 400 that a body gets."""
    response = post(server, body)
    assert response.status_code == 400, response.text
    answer = response.json()
    assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
    message: str = answer["error"]["message"]
    return message


def asked(script: Script, server: Server, prompt: str) -> bool:
    return unpack_ids(script.requests[-1].input_ids) == server.tokenizer.encode(prompt)


# ---- the shape of answers and events, held to the client's own types -------------------------------------------------

EVENT_TYPES = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(RawMessageStreamEvent)[0])
}


def unknown_fields(model: pydantic.BaseModel, place: str = "") -> Iterator[str]:
    for name, value in model:
        here = f"{place}.{name}"
        if name in (model.model_extra or {}):
            yield here
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, pydantic.BaseModel):
                yield from unknown_fields(item, here)


def check(kind: type[pydantic.BaseModel], data: Any) -> None:
    """`data` is of the client's type, with no field missing, of a wrong type, or unknown to it."""
    assert not list(unknown_fields(kind.model_validate_json(json.dumps(data), strict=True)))


def events_of(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events on the wire, each checked."""
    response = post(server, body | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *blocks, end = response.text.split("\n\n")
    assert end == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "error":
            check(EVENT_TYPES[event["type"]], event)
        events.append(event)
    return events


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{name: block[name] for name in block if name != "id"} for block in message["content"]]
    return {name: value for name, value in message.items() if name != "id"} | {"content": content}


OMITTED = {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}


@pytest.mark.parametrize("per_step", [1, 1000])
@pytest.mark.parametrize(
    ("said", "fields", "kinds", "stop_reason"),
    [
        ("Hello, 世界 😀!", {}, ["text"], "end_turn"),
        ("", {}, [], "end_turn"),
        ("Hm.</think>Hello!", THINK, ["thinking", "text"], "end_turn"),
        ("Hm.</think>Hello!", OMITTED, ["thinking", "text"], "end_turn"),
        ("Hm.</think>Hello!", THINK | {"max_tokens": 2}, ["thinking"], "max_tokens"),
        (f"Hm.</think>I add.\n\n{CALL}", THINK | {"tools": [ADD]}, ["thinking", "text", "tool_use"], "tool_use"),
        (f"{CALL}{CALL}Done.", {"tools": [ADD]}, ["tool_use", "tool_use", "text"], "tool_use"),
        (f'<{D}invoke name="add"/>', {"tools": [ADD]}, ["tool_use"], "tool_use"),
        (CALL, {"tools": [ADD], "max_tokens": 128}, ["tool_use"], "max_tokens"),
        ("one two", {"stop_sequences": ["x", " t"]}, ["text"], "stop_sequence"),
    ],
)
def test_a_stream_tells_what_the_whole_message_holds(
    agent: Server, said: str, fields: dict[str, Any], kinds: list[str], stop_reason: str, per_step: int
) -> None:
    """Blocks follow each other, each begun, told in deltas and ended; the client makes the same message of it."""
    agent.play(said, per_step=per_step)
    whole = post(agent, fields).json()
    check(Message, whole)
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["stop_reason"] == stop_reason
    assert whole["stop_sequence"] == (" t" if stop_reason == "stop_sequence" else None)
    start, *middle, delta, stop = events_of(agent, fields)
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert (message["content"], message["stop_reason"], message["role"]) == ([], None, "assistant")
    for i in range(len(kinds)):
        own = [event["type"] for event in middle if event["index"] == i]
        assert [event["index"] for event in middle[: len(own)]] == [i] * len(own)
        middle = middle[len(own) :]
        assert own == ["content_block_start", *["content_block_delta"] * (len(own) - 2), "content_block_stop"]
    assert middle == []
    assert delta["usage"] == whole["usage"]
    with client(agent).messages.stream(
        **({"model": "tiny-whale", "max_tokens": 2000, "messages": [HI]} | fields)
    ) as events:
        accumulated = events.get_final_message().to_dict()
    assert without_ids(accumulated) == without_ids(whole) | {"stop_details": None}


def test_message_and_usage(server: Server) -> None:
    script = server.play("Hm.</think>Hello!")
    message = create(server, max_tokens=99, system="Be brief.", **THINK)
    assert (message.role, message.type, message.model) == ("assistant", "message", "tiny-whale")
    thinking, text = message.content
    assert (thinking.thinking, text.text) == ("Hm.", "Hello!")
    assert thinking.signature  # clients drop thinking that has none
    prompt = server.tokenizer.encode(f"{BOS}Be brief.<｜User｜>hi<｜Assistant｜><think>")
    (request,) = script.requests
    assert unpack_ids(request.input_ids) == prompt
    assert request.sampling.max_new_tokens == 99
    assert request.rid.startswith(message.id)  # so that /abort_request knows it
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (len(prompt) - 3, 3)
    assert usage.output_tokens == len(server.tokenizer.encode("Hm.</think>Hello!")) + 1
    assert usage.output_tokens_details.thinking_tokens == len(server.tokenizer.encode("Hm.</think>"))


def test_tool_use_has_its_input_as_an_object(agent: Server) -> None:
    agent.play(CALL + CALL)
    first, second = create(agent, tools=[ADD]).content
    assert (first.name, first.input) == ("add", {"a": 1, "b": 'x "y"\n'})
    assert first.id.startswith("toolu_")
    assert first.id != second.id
    # A call that is cut has the members that are complete, as the client reads them from a stream.
    agent.play(CALL)
    message = create(agent, tools=[ADD], max_tokens=128)
    assert (message.content[0].input, message.stop_reason) == ({"a": 1}, "max_tokens")


def test_sampling_fields_reach_the_engine(server: Server) -> None:
    script = server.play("x")
    body = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "stop_sequences": ["z"], "max_tokens": 9}
    create(server, extra_body=body)
    sampling = script.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 7)
    assert (sampling.stop, sampling.max_new_tokens) == (("z",), 9)
    create(server, max_tokens=9, extra_body={"top_k": 0})
    assert script.requests[1].sampling.top_k == -1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_go_to_the_end_of_the_context(server: Server, stream: bool) -> None:
    """Agents ask for more tokens than there is room for."""
    script = server.play("abcdef" * 100, per_step=50)
    body = {"max_tokens": 100_000}
    if stream:
        stop_reason = events_of(server, body)[-2]["delta"]["stop_reason"]
    else:
        stop_reason = create(server, **body).stop_reason
    assert stop_reason == "model_context_window_exceeded"
    (request,) = script.requests
    assert request.sampling.max_new_tokens == CONTEXT - len(unpack_ids(request.input_ids))
    assert create(server, max_tokens=50).stop_reason == "max_tokens"


def test_what_claude_code_sends_is_accepted(agent: Server) -> None:
    script = agent.play("Hm.</think>Hello!")
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        "system": [{"type": "text", "text": "You are an agent."} | cached, {"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>r</system-reminder>"}]},
            {"role": "user", "content": [{"type": "text", "text": "hi"} | cached]},
        ],
        "tools": [ADD | cached | {"type": "custom", "eager_input_streaming": True, "input_examples": [{"a": 1}]}],
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "enabled", "budget_tokens": 1999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "diagnostics": {"previous_message_id": None},
        "service_tier": "auto",
        "temperature": 1,
        "stream": True,
    }
    response = post(agent, body, "/v1/messages?beta=true")
    assert response.status_code == 200
    prompt = "".join(agent.tokenizer.token_text(i) for i in unpack_ids(script.requests[0].input_ids))
    assert prompt.startswith(f"{BOS}You are an agent.\n\nBe brief.\n\n## Tools\n\n")
    assert (
        '\n{"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}, '
        '"input_examples": [{"a": 1}]}\n'
    ) in prompt
    assert prompt.endswith("<｜User｜><system-reminder>r</system-reminder>\n\nhi<｜Assistant｜><think>")


# ---- messages -> prompt ----------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "q"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1, "b": 'x "y"\n'}}
OTHER_USE = {"type": "tool_use", "id": "t2", "name": "add", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1"}
WRITTEN = f"\n\n{CALL}"
ASK = "<｜User｜>q<｜Assistant｜></think>"


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": words} for words in texts]


def results(*texts: str) -> str:
    lines = "".join(f"\n<result>{words}</result>" for words in texts)
    return f"{EOS}\n\n<function_results>{lines}\n</function_results>\n\n"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([USER], ASK),
        ([{"role": "user", "content": text("a", "b")}, USER], "<｜User｜>a\n\nb\n\nq<｜Assistant｜></think>"),
        (
            [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": text("b", "c")}, USER],
            f"{ASK}a\n\nbc{EOS}{ASK}",
        ),
        # A system message later on joins what it follows.
        ([{"role": "system", "content": "s"}, USER], f"s{ASK}"),
        ([USER, {"role": "system", "content": text("s")}], "<｜User｜>q\n\ns<｜Assistant｜></think>"),
        (
            [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT | {"content": "3"}]}],
            f"{ASK}{WRITTEN}{results('3')}</think>",
        ),
        (
            [
                USER,
                {"role": "assistant", "content": [*text("Look."), USE]},
                {"role": "user", "content": [RESULT | {"content": text("3", "4")}]},
                {"role": "system", "content": "s"},
            ],
            f"{ASK}Look.{WRITTEN}{results('3' + chr(10) * 2 + '4' + chr(10) * 2 + 's')}</think>",
        ),
        # Texts beside results belong to the tool loop.
        (
            [
                USER,
                {"role": "assistant", "content": [USE]},
                {"role": "user", "content": [*text("r"), RESULT | {"content": "3"}, *text("s")]},
            ],
            f"{ASK}{WRITTEN}{results('3' + chr(10) * 2 + 'r' + chr(10) * 2 + 's')}</think>",
        ),
        # A message of its own ends it.
        (
            [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}, USER],
            f"{ASK}{WRITTEN}{results('')}</think>{ASK}",
        ),
        # Results go to their calls; an error says that it is one.
        (
            [
                USER,
                {"role": "assistant", "content": [USE, OTHER_USE]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                        RESULT | {"content": "3", "is_error": False},
                    ],
                },
            ],
            f"{ASK}{WRITTEN.removesuffix(f'</{D}function_calls>')}"
            f'<{D}invoke name="add">\n\n</{D}invoke>\n</{D}function_calls>{results("3", "Error: no")}</think>',
        ),
        # The beginning of the answer.
        ([USER, {"role": "assistant", "content": "{"}], f"{ASK}{{"),
    ],
)
def test_messages_make_the_prompt(agent: Server, messages: list[Any], prompt: str) -> None:
    script = agent.play("x")
    create(agent, messages=messages)
    assert asked(script, agent, BOS + prompt)


@pytest.mark.parametrize(
    ("blocks", "reasoning"),
    [
        ([{"type": "thinking", "thinking": "R", "signature": "of another server"}], "R"),
        ([{"type": "thinking", "thinking": "", "signature": "baleen-Ug=="}], "R"),
        ([{"type": "thinking", "thinking": "", "signature": "EqQBCgIYAhIM"}], ""),
        ([{"type": "thinking", "thinking": "", "signature": "baleen-broken"}], ""),
        ([{"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3"}, {"type": "thinking", "thinking": "R"}], "R"),
    ],
)
def test_thinking_comes_back_inside_the_tool_loop(agent: Server, blocks: list[Any], reasoning: str) -> None:
    script = agent.play("x</think>y")
    messages = [
        USER,
        {"role": "assistant", "content": [*blocks, *text("Look."), USE]},
        {"role": "user", "content": [RESULT | {"content": "3"}, *text("reminder")]},
    ]
    create(agent, messages=messages, **THINK)
    done = f"Look.{WRITTEN}{results('3' + chr(10) * 2 + 'reminder')}"
    assert asked(script, agent, f"{BOS}<｜User｜>q<｜Assistant｜><think>{reasoning}</think>{done}<think>")
    create(agent, messages=[*messages, USER], **THINK)  # the next question ends the loop
    assert asked(script, agent, f"{BOS}{ASK}{done}</think><｜User｜>q<｜Assistant｜><think>")
    create(agent, messages=messages, thinking={"type": "disabled"})
    assert asked(script, agent, f"{BOS}{ASK}{done}</think>")


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "any"}, "required", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
    ],
)
def test_tool_choice_is_enforced(agent: Server, choice: Any, expected: Any, parallel: bool) -> None:
    script = agent.play(CALL)
    create(agent, tools=[ADD], tool_choice=choice)
    grammar = script.requests[0].sampling.grammar
    assert grammar is not None
    spec = json.loads(grammar.text)
    assert (grammar.kind, spec["tool_choice"], spec["parallel_tool_calls"]) == ("tools", expected, parallel)


def test_without_a_choice_calls_are_text(agent: Server) -> None:
    script = agent.play(CALL)
    message = create(agent, tools=[ADD], tool_choice={"type": "none"})
    assert (message.content[0].text, message.stop_reason) == (CALL, "end_turn")
    create(agent, tools=[ADD])
    assert script.requests[1].sampling.grammar is None


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_structured_output(agent: Server, place: str) -> None:
    script = agent.play("{}")
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    asked_for = {"type": "json_schema", "schema": schema}
    body = {"output_config": {"format": asked_for}} if place == "output_config" else {"output_format": asked_for}
    create(agent, extra_body=body)
    grammar = script.requests[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": ...}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "image"}]}]}, "messages[1].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].type"),
        ({"messages": [USER, {"role": "assistant", "content": [USE]}]}, "messages[1].tool_calls"),
        ({"messages": [{"role": "assistant", "content": [USE | {"input": "{}"}]}]}, "messages[0].content[0].input"),
        ({"messages": [{"role": "user", "content": [RESULT | {"content": [IMAGE]}]}]}, "messages[0].content[0].con"),
        ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [ADD, {"type": "bash_20250124", "name": "bash"}]}, "tools[1].type"),
        ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
        ({"tools": [ADD | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [ADD | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"tools": [ADD | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"speed": "fast"}, "speed"),
        ({"min_p": 0.1}, "min_p"),
        ({"messages": [{"role": "user", "content": "long " * 10_000}]}, "prompt is too long: messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(agent: Server, body: dict[str, Any], field: str) -> None:
    assert refusal(agent, body).startswith(field)


# ---- other routes, errors --------------------------------------------------------------------------------------------


def test_count_tokens(agent: Server) -> None:
    agent.play("x")
    body: dict[str, Any] = {"system": "s", "tools": [ADD], "thinking": {"type": "adaptive"}}
    counted = client(agent).messages.count_tokens(model="tiny-whale", messages=[HI], **body)
    usage = create(agent, **body).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert agent.script.requests[1:] == []  # counting asks the engine nothing
    picture: Any = {"role": "user", "content": [IMAGE]}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client(agent).messages.count_tokens(model="tiny-whale", messages=[picture])
    with pytest.raises(anthropic.NotFoundError):
        client(agent).messages.count_tokens(model="claude", messages=[HI])


def test_an_unknown_model_is_refused_with_the_way_out(server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError, match=r"'tiny-whale' \(--served-model-name\)") as caught:
        create(server, model="claude-x")
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_engine_errors_before_and_during_the_answer(server: Server) -> None:
    server.play("abcdef", fail_after=0)
    for stream in (False, True):
        with pytest.raises(anthropic.InternalServerError, match="NaN") as caught:
            create(server, max_tokens=50, stream=stream)
        assert caught.value.body == {"type": "error", "error": {"type": "api_error", "message": "the logits held NaN"}}
    server.play("abcdef", fail_after=3)
    events = events_of(server, {"max_tokens": 50})
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "the logits held NaN"}}
    assert "".join(event["delta"]["text"] for event in events[2:-1]) == "abc"
    with pytest.raises(anthropic.APIStatusError, match="NaN"):
        list(create(server, max_tokens=50, stream=True))


def test_what_the_grammar_library_cannot_do_is_refused_by_name(agent: Server) -> None:
    agent.play(fail_after=0, refusal="no such schema")
    asked_for = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}
    assert refusal(agent, asked_for) == "output_config.format: no such schema"


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_is_an_error(agent: Server, stream: bool) -> None:
    def reply(request: GenerateRequest) -> list[int]:
        agent.call(agent.client.abort_matching, request.rid)
        return agent.tokenizer.encode("abcdef" * 100)

    agent.play(reply=reply, pause=0.01)
    with pytest.raises(anthropic.APIStatusError, match="abort"):
        list(create(agent, stream=stream))


def test_a_client_that_leaves_ends_the_request(agent: Server) -> None:
    script = agent.play("abcdef" * 1000, pause=0.005)
    with create(agent, stream=True) as events:
        next(iter(events))
    wait_until(lambda: len(script.aborted) == 1)


def test_either_header_carries_the_key(tmp_path: Path) -> None:
    with running_server(tmp_path, api_key="secret") as server:
        server.play("Hello!")
        ask: dict[str, Any] = {"model": "tiny-whale", "max_tokens": 20, "messages": [HI]}
        for options in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
            assert client(server, **options).messages.create(**ask).content[0].text == "Hello!"
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client(server, api_key="wrong").messages.create(**ask)
        assert caught.value.body["error"]["type"] == "authentication_error"
