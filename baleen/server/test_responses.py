"""/v1/responses through the openai client, over real HTTP, with a scripted engine behind real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from baleen.messages import GenerateRequest, unpack_ids
from baleen.server.conftest import Script, Server, running_server, wait_until
from baleen.server.response_store import ResponseStore, StoredResponse

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
CALL = (
    f'<{D}function_calls>\n<{D}invoke name="add">\n<{D}parameter name="a" string="false">1</{D}parameter>\n'
    f'<{D}parameter name="b" string="true">x "y"\n</{D}parameter>\n</{D}invoke>\n</{D}function_calls>'
)
ARGUMENTS = r'{"a": 1, "b": "x \"y\"\n"}'
ADD = {"type": "function", "name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
THINK = {"reasoning": {"effort": "high"}}
ENCRYPTED = {"include": ["reasoning.encrypted_content"]}
USER = {"role": "user", "content": "q"}
OUT = {"type": "function_call_output", "call_id": "c"}
FUNCTION_CALL = {"type": "function_call", "call_id": "c", "name": "add", "arguments": ARGUMENTS}
RESULT = f"{EOS}\n\n<function_results>\n<result>3</result>\n</function_results>\n\n"
WRITTEN = f"\n\n{CALL}"  # as the prompt has it


def create(server: Server, **fields: Any) -> Any:
    return server.openai().responses.create(**({"model": "default", "input": "hi"} | fields))


def post(server: Server, body: dict[str, Any]) -> httpx.Response:
    with server.http() as http:
        return http.post("/v1/responses", json={"input": "hi"} | body)


def refusal(server: Server, body: dict[str, Any]) -> tuple[str | None, str]:
    """(field, message) of the 400 that a body gets."""
    response = post(server, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["message"]


def asked(script: Script, server: Server, prompt: str) -> bool:
    return unpack_ids(script.requests[-1].input_ids) == server.tokenizer.encode(prompt)


# ---- the shape of answers and events, held to the client's own types -----------------------------------------------

EVENT_TYPES = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}


def unknown_fields(model: pydantic.BaseModel, place: str = "") -> Iterator[str]:
    for name, value in model:
        here = f"{place}.{name}"
        if name in (model.model_extra or {}):
            yield here
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, pydantic.BaseModel):
                yield from unknown_fields(item, here)


def check(kind: type[pydantic.BaseModel], data: Any) -> pydantic.BaseModel:
    """`data` as the client's type, with no field missing, of a wrong type, or unknown to it."""
    model = kind.model_validate_json(json.dumps(data), strict=True)
    unknown = {place.removeprefix(".response") for place in unknown_fields(model)}
    unknown -= {".store", ".output.status", ".item.status"}  # OpenAI's answers have them too, of custom calls the last
    unknown -= {".logprobs.bytes", ".logprobs.top_logprobs.bytes"}  # in deltas too, as in the text at the end
    assert not unknown
    return model


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
        check(EVENT_TYPES[event["type"]], event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: item[name] for name in item if name not in ("id", "call_id")} for item in items]


CUSTOM = {"type": "custom", "name": "patch", "description": "Patches"}
CUSTOM_CALL = (
    f'<{D}function_calls>\n<{D}invoke name="patch">\n<{D}parameter name="input" string="true">'
    f'*** a "b"\n</{D}parameter>\n</{D}invoke>\n</{D}function_calls>'
)
FILES = {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [ADD, CUSTOM]}
FILES_CALLS = CALL.replace('"add"', '"mcp__files__add"') + CUSTOM_CALL.replace('"patch"', '"mcp__files__patch"')


@pytest.mark.parametrize("per_step", [1, 1000])
@pytest.mark.parametrize(
    ("said", "fields", "kinds"),
    [
        ("Hello, 世界 😀!", {}, ["message"]),
        ("", {}, []),
        ("Hm.</think>Hello!", THINK, ["reasoning", "message"]),
        (
            "Hm.</think>Hello!",
            {"reasoning": {"effort": "low", "summary": "auto"}} | ENCRYPTED,
            ["reasoning", "message"],
        ),
        ("Hm.</think>Hello!", THINK | ENCRYPTED | {"top_logprobs": 2}, ["reasoning", "message"]),
        (f"Hm.</think>I add.\n\n{CALL}", THINK | {"tools": [ADD]}, ["reasoning", "message", "function_call"]),
        (f"{CALL}{CALL}", {"tools": [ADD]}, ["function_call", "function_call"]),
        (f"{CUSTOM_CALL}", {"tools": [CUSTOM]}, ["custom_tool_call"]),
        (FILES_CALLS, {"tools": [FILES]}, ["function_call", "custom_tool_call"]),
        ("Hello, I am cut", {"max_output_tokens": 5}, ["message"]),
        ("Hm.</think>Hello!", THINK | {"max_output_tokens": 2}, ["reasoning"]),
        (CALL, {"tools": [ADD], "max_output_tokens": 84}, ["function_call"]),
    ],
)
def test_a_stream_tells_what_the_whole_answer_holds(
    agent: Server, said: str, fields: dict[str, Any], kinds: list[str], per_step: int
) -> None:
    """Every item is announced, told in deltas, and done; the last event holds what is answered without a stream."""
    agent.play(said, per_step=per_step)
    whole = post(agent, fields).json()
    check(Response, whole)
    assert [item["type"] for item in whole["output"]] == kinds
    events = events_of(agent, fields)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    changing = ("id", "output", "created_at", "completed_at")
    assert {k: v for k, v in last["response"].items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }
    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])
    middle = events[2:-1]
    for i, item in enumerate(last["response"]["output"]):
        own = [event for event in middle if event["output_index"] == i]
        assert own == middle[: len(own)], "items follow each other"
        middle = middle[len(own) :]
        assert_item_events(item, own)
    assert middle == []


def assert_item_events(item: dict[str, Any], events: list[dict[str, Any]]) -> None:
    names = [event["type"].removeprefix("response.") for event in events]
    begun, done = events[0]["item"], events[-1]["item"]
    assert (names[0], names[-1]) == ("output_item.added", "output_item.done")
    assert (begun["status"], begun["id"], done) == ("in_progress", item["id"], item)
    assert {event["item_id"] for event in events[1:-1]} == {item["id"]}
    deltas = "".join(event.get("delta", "") for event in events)
    match item:
        case {"type": "message", "content": [{"text": text}]}:
            name, part = "output_text", "content_part"
        case {"type": "reasoning", "content": [{"text": text}], "summary": []}:
            name, part = "reasoning_text", "content_part"
        case {"type": "reasoning", "summary": [{"text": text}]}:
            name, part = "reasoning_summary_text", "reasoning_summary_part"
            assert "content" not in item
        case {"type": "function_call", "arguments": text}:
            name, part = "function_call_arguments", None
        case {"type": "custom_tool_call", "input": text}:
            name, part = "custom_tool_call_input", None
    assert deltas == text
    assert text in events[names.index(f"{name}.done")].values()
    frame = [f"{part}.added", f"{part}.done"] if part else []
    assert [n for n in names if not n.endswith("delta")][1:-1] == [*frame[:1], f"{name}.done", *frame[1:]]
    if item["type"] == "message":
        told = [entry for event in events if event["type"].endswith("delta") for entry in event["logprobs"]]
        assert told == item["content"][0]["logprobs"]


def test_an_answer_says_what_was_asked(server: Server) -> None:
    script = server.play("Hello!")
    asked_for = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "prompt_cache_key": "key",
        "safety_identifier": "someone",
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "me",
        "truncation": "disabled",
        "tool_choice": "auto",
    }
    response = create(server, **asked_for)
    assert {name: getattr(response, name) for name in asked_for} == asked_for
    assert (response.status, response.output_text, response.model) == ("completed", "Hello!", "tiny-whale")
    assert response.id.startswith("resp_")
    prompt = server.tokenizer.encode(f"{BOS}Be brief.<｜User｜>hi<｜Assistant｜></think>")
    (request,) = script.requests
    assert unpack_ids(request.input_ids) == prompt
    assert request.rid.startswith(response.id)  # so that /abort_request knows it
    num_said = len(server.tokenizer.encode("Hello!")) + 1
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        len(prompt),
        num_said,
        len(prompt) + num_said,
    )
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (3, 0)


def test_reasoning_tokens_are_counted(server: Server) -> None:
    server.play("Hm.</think>Hello!")
    usage = create(server, **THINK).usage
    assert usage.output_tokens_details.reasoning_tokens == len(server.tokenizer.encode("Hm.</think>"))


def test_sampling_fields_reach_the_engine(server: Server) -> None:
    script = server.play("x")
    extensions = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "stop": ["z"], "seed": 4}
    create(server, temperature=0.25, top_p=0.5, max_output_tokens=9, extra_body=extensions)
    sampling = script.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.25, 0.5, 9)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.5)
    assert (sampling.stop, sampling.seed) == (("z",), 4)


@pytest.mark.parametrize(
    ("said", "fields", "status", "item_status"),
    [
        ("Hello, I am cut", {"max_output_tokens": 3}, "incomplete", "incomplete"),
        ("Hm, I think", THINK | {"max_output_tokens": 3}, "incomplete", "incomplete"),
        (CALL, {"tools": [ADD], "max_output_tokens": 84}, "incomplete", "incomplete"),
        ("Hello", {}, "completed", "completed"),
    ],
)
def test_a_cut_answer_is_incomplete(
    agent: Server, said: str, fields: dict[str, Any], status: str, item_status: str
) -> None:
    agent.play(said)
    response = create(agent, **fields)
    assert (response.status, response.output[-1].status) == (status, item_status)
    assert (response.incomplete_details is None) == (status == "completed")
    if response.incomplete_details:
        assert response.incomplete_details.reason == "max_output_tokens"


def test_a_call_that_went_wrong_is_incomplete(agent: Server) -> None:
    agent.play(f'<{D}invoke name="add">{{"a": 1, b: 2}}</{D}invoke>')
    call, message = create(agent, tools=[ADD]).output
    assert (call.status, call.arguments) == ("incomplete", '{"a": 1, ')
    assert message.content[0].text == f"b: 2}}</{D}invoke>"


def test_a_call_amid_the_reasoning_comes_back_in_one_turn(agent: Server) -> None:
    script = agent.play(f"R1\n\n{CALL}R2</think>T")
    response = create(agent, tools=[ADD], **THINK)
    assert [item.type for item in response.output] == ["reasoning", "function_call", "reasoning", "message"]
    items = [
        USER,
        *(item.to_dict() for item in response.output),
        OUT | {"call_id": response.output[1].call_id, "output": "3"},
    ]
    create(agent, input=items, **THINK)
    assert asked(script, agent, f"{BOS}<｜User｜>q<｜Assistant｜><think>R1R2</think>T{WRITTEN}{RESULT}<think>")


def test_logprobs_are_of_the_tokens_of_the_text(agent: Server) -> None:
    for per_step in (1, 4):
        agent.play("Hm 世.</think>a 世 b", per_step=per_step)
        response = create(agent, include=["message.output_text.logprobs"], top_logprobs=2, **THINK)
        content = response.output[1].content[0]
        assert [bytes(entry.bytes) for entry in content.logprobs] == [
            agent.tokenizer.token_bytes(token) for token in agent.tokenizer.encode("a 世 b")
        ]
        assert {len(entry.top_logprobs) for entry in content.logprobs} == {2}
    agent.play(f"Look.\n\n{CALL}", per_step=3)
    content = create(agent, include=["message.output_text.logprobs"], tools=[ADD]).output[0].content[0]
    assert b"".join(bytes(entry.bytes) for entry in content.logprobs) == b"Look."
    agent.play(f"Look.\n\n{CALL}Well.", per_step=3)
    _, _, after = create(agent, include=["message.output_text.logprobs"], tools=[ADD]).output
    assert (after.content[0].text, after.content[0].logprobs) == ("Well.", [])
    assert create(agent).output[0].content[0].logprobs == []


# ---- stored responses ----------------------------------------------------------------------------------------------


def test_a_stored_response_can_be_read_continued_and_deleted(agent: Server) -> None:
    script = agent.play("Hello!")
    client = agent.openai()
    first = create(agent, instructions="Be brief.", input=[{"role": "developer", "content": "d"}, USER])
    assert client.responses.retrieve(first.id) == first
    second = create(agent, previous_response_id=first.id, instructions="Be long.", stream=True)
    second = list(second)[-1].response
    assert second.previous_response_id == first.id
    turn = f"d<｜User｜>q<｜Assistant｜></think>Hello!{EOS}<｜User｜>hi<｜Assistant｜></think>"
    assert asked(script, agent, f"{BOS}Be long.\n\n{turn}")  # the instructions of the first are not carried over
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match=first.id):
        client.responses.retrieve(first.id)
    assert client.responses.retrieve(second.id).output_text == "Hello!"
    create(agent, previous_response_id=second.id)
    assert asked(script, agent, f"{BOS}{turn}Hello!{EOS}<｜User｜>hi<｜Assistant｜></think>")
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)


def test_an_answer_can_be_continued_twice(agent: Server) -> None:
    script = agent.play("Hello!")
    first = create(agent)
    for text in ("a", "b"):
        create(agent, previous_response_id=first.id, input=text)
        begin = f"{BOS}<｜User｜>hi<｜Assistant｜></think>Hello!{EOS}"
        assert asked(script, agent, f"{begin}<｜User｜>{text}<｜Assistant｜></think>")


def test_what_is_not_stored(agent: Server) -> None:
    agent.play("Hello!")
    response = create(agent, store=False)
    with pytest.raises(openai.NotFoundError):
        agent.openai().responses.retrieve(response.id)
    agent.play("abcdef", fail_after=3)
    failed = list(create(agent, stream=True))[-1].response
    with pytest.raises(openai.NotFoundError):
        agent.openai().responses.retrieve(failed.id)


def test_cancel_and_streams_of_stored_responses_are_refused(agent: Server) -> None:
    agent.play("Hello!")
    client, response = agent.openai(), create(agent)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_unknown")
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.responses.retrieve(response.id, stream=True)


def test_several_api_processes_store_nothing(tmp_path: Path) -> None:
    """The next request may come to another one."""
    with running_server(tmp_path, tokenizer_worker_num=2) as server:
        server.play("Hello!")
        response = create(server)
        with pytest.raises(openai.BadRequestError, match="tokenizer-worker-num"):
            create(server, previous_response_id=response.id)
        with pytest.raises(openai.BadRequestError, match=r"store: .*tokenizer-worker-num"):
            create(server, store=True)


def test_the_store_forgets_the_oldest() -> None:
    def stored(name: str, num_bytes: int) -> StoredResponse:
        return StoredResponse(b"", [], [{"id": f"item_{name}"}], num_bytes)

    store = ResponseStore(enabled=True, max_responses=3, max_bytes=100)
    for name in "abcd":
        store.put(name, stored(name, 10))
    assert [bool(store.get(name)) for name in "abcd"] == [False, True, True, True]
    assert (store.item("item_a"), store.item("item_b")) == (None, {"id": "item_b"})
    store.put("e", stored("e", 85))
    assert [bool(store.get(name)) for name in "bcde"] == [False, False, True, True]
    store.put("f", stored("f", 101))
    assert [bool(store.get(name)) for name in "def"] == [False, False, False]
    store.put("g", stored("g", 100))
    assert store.delete("g")
    assert not store.delete("g")
    store.put("h", stored("h", 100))
    assert store.get("h")


# ---- when it goes wrong --------------------------------------------------------------------------------------------


def test_engine_errors_before_and_during_the_answer(agent: Server) -> None:
    agent.play("abcdef", fail_after=0)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="NaN"):
            create(agent, stream=stream)
    agent.play("abcdef", fail_after=3)
    with pytest.raises(openai.InternalServerError, match="NaN"):
        create(agent)
    events = events_of(agent, {})
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "the logits held NaN")
    (item,) = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "abc")


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_ends_the_response_as_failed(agent: Server, stream: bool) -> None:
    script = agent.play("abcdef" * 100, pause=0.01)

    def reply(request: GenerateRequest) -> list[int]:
        agent.call(agent.client.abort_matching, request.rid)
        return agent.tokenizer.encode("abcdef" * 100)

    script.reply = reply
    response = events_of(agent, {})[-1]["response"] if stream else post(agent, {}).json()
    check(Response, response)
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert "abort" in response["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        agent.openai().responses.retrieve(response["id"])


def test_a_client_that_leaves_ends_the_request(agent: Server) -> None:
    script = agent.play("abcdef" * 1000, pause=0.005)
    with create(agent, stream=True) as events:
        next(iter(events))
    wait_until(lambda: len(script.aborted) == 1)


def test_unknown_model(agent: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny-whale"):
        create(agent, model="gpt-6")
