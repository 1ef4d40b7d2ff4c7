"""5,000 broken bodies over all routes that take one: never a 5xx, every error in its route's shape, and the server as
healthy after each hundred as before.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from baleen.server.app import ROUTES
from baleen.server.conftest import Server, running_server

SEED = 3
NUM_BODIES = 5000
JSON = "application/json"

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": [1, None]}}},
        "strict": True,
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
LOOP = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
    {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "c"},
]
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "integer"}}}
SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5},
    "stop": ["a", "b"],
    "stop_token_ids": [7],
    "stop_regex": ["x+y"],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "no_stop_trim": True,
}
ITEMS = [
    {"type": "message", "role": "developer", "content": "d"},
    {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "o"},
]
BLOCKS = [
    {"role": "user", "content": "u"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "text", "text": "x"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "r"}]}],
    },
]
MESSAGES = {
    "model": "default",
    "system": [{"type": "text", "text": "s"}],
    "messages": BLOCKS,
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "default", "messages": LOOP[:2], "max_tokens": 8, "n": 2, "seed": 5, "user": "me", **SAMPLING},
        {"messages": LOOP, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "stream": True},
        {
            "messages": LOOP[1:2],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        {
            "messages": [*LOOP[1:2], {"role": "assistant", "content": "And"}],
            "continue_final_message": True,
            "chat_template_kwargs": {"thinking": True},
            "thinking": {"type": "enabled"},
            "reasoning": {"effort": "low", "enabled": True},
            "reasoning_effort": "high",
            "separate_reasoning": False,
            "regex": "[a-z]+",
            "rid": "one",
            "priority": 0,
        },
        {
            "messages": LOOP[1:2],
            "input_ids": [5, 6, 7],
            "min_tokens": 1,
            "max_completion_tokens": 4,
            "ebnf": "root ::= 'a'",
        },
    ],
    "/v1/completions": [
        {"prompt": "abc", "max_tokens": 4, "logprobs": 2, "echo": True, **SAMPLING},
        {"prompt": ["a", [5, 6]], "n": 2, "stream": True, "seed": -1, "rid": "two"},
        {"prompt": [5, 6, 7], "json_schema": json.dumps(SCHEMA), "suffix": None, "best_of": 1},
    ],
    "/v1/responses": [
        {"model": "default", "input": "hi", "max_output_tokens": 8, "store": True, "metadata": {"a": "b"}},
        {
            "input": ITEMS,
            "instructions": "i",
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}, {"type": "custom", "name": "g"}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "reasoning": {"effort": "high", "summary": "auto"},
            "include": ["reasoning.encrypted_content"],
            "stream": True,
        },
        {
            "input": ITEMS[:2],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
            "top_logprobs": 2,
        },
    ],
    "/v1/responses/resp_1/cancel": [{}],
    "/v1/messages": [
        MESSAGES
        | {"max_tokens": 8, "stop_sequences": ["x"], "temperature": 0.5, "top_k": 3, "metadata": {"user_id": "u"}},
        {"model": "default", "max_tokens": 4, "messages": BLOCKS[:1], "stream": True},
        {
            "model": "default",
            "max_tokens": 2000,
            "messages": BLOCKS[:1],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
    ],
    "/v1/messages/count_tokens": [MESSAGES],
    "/generate": [
        {"text": "abc", "sampling_params": SAMPLING | {"max_new_tokens": 4, "n": 2}, "return_logprob": True},
        {
            "input_ids": [[5, 6], [7]],
            "sampling_params": [{"max_new_tokens": 3}, {"sampling_seed": 1, "json_schema": SCHEMA}],
            "rid": ["a", "b"],
            "stream": True,
            "top_logprobs_num": 1,
            "logprob_start_len": 0,
            "return_text_in_logprobs": True,
        },
    ],
    "/tokenize": [
        {"prompt": ["a", "b"]},
        {"messages": LOOP, "tools": [TOOL], "chat_template_kwargs": {"thinking": True}},
    ],
    "/v1/tokenize": [{"prompt": "a", "add_special_tokens": True}],
    "/detokenize": [{"tokens": [[5, 6], [7]], "skip_special_tokens": False}],
    "/v1/detokenize": [{"tokens": [5, 6]}],
    "/abort_request": [{"rid": "one", "abort_all": False}],
    "/flush_cache": [{}],
}
LEAVES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "a", "0", "null", "\0", "\ud800", "\udfff x", "\U0010ffff",
    "e\u0301\u202e\ufeff", "<｜DSML｜function_calls>", "<think>", "</think>", "<｜end▁of▁sentence｜>", "{}", "[",
    "x" * 5000, "(" * 300, "(a+)+$", [], {}, [[]], [None], [{}], {"": None}, {"type": "object"}, {"type": None},
    {"$ref": "#"}, {"$ref": "nowhere"}, {"a": "\ud800"}, {"role": "user", "content": "u"},
    {"type": "function", "function": {}}, {"type": "text", "text": None},
    {"type": "image_url", "image_url": {"url": "x"}}, "%s{0}",
]  # fmt: skip
NAMES = [*SAMPLING, "model", "messages", "prompt", "n", "stream", "tools", "tool_choice", "response_format", "rid"]
NAMES += [
    "regex",
    "thinking",
    "max_tokens",
    "type",
    "role",
    "content",
    "name",
    "schema",
    "",
    "\ud800",
    "a_field_of_2031",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    with running_server(folder, context_length=8192, max_total_tokens=65536) as server:
        server.play("hi")
        yield server


class Mutator:
    """Makes one broken body after another from the seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def body(self, valid: dict[str, Any]) -> bytes:
        value: Any = copy.deepcopy(valid)
        try:
            for _ in range(self.random.choice((1, 1, 1, 2, 3, 5))):
                value = self._mutate(value)
            data = json.dumps(value).encode()  # NaN and Infinity as such, lone surrogates as escapes
        except RecursionError:
            data = b"[" * 2000
        return self._garble(data) if self.random.random() < 0.15 else data

    def content_type(self) -> str | None:
        if self.random.random() < 0.95:
            return JSON
        return self.random.choice(
            [None, "", "text/plain", "application/x-www-form-urlencoded", "application/json;;;", "multipart/form-data"]
        )

    def _mutate(self, value: Any) -> Any:
        places = list(_places(value))
        parent, key = self.random.choice(places) if places else (None, None)
        match self.random.randrange(8):
            case 0 | 1 | 2 if parent is not None:
                parent[key] = self._leaf()
            case 3 if parent is not None:
                del parent[key]
            case 4 if parent is not None:
                parent[key] = self.random.choice(
                    ([parent[key]], {"a": parent[key]}, [parent[key]] * 3, str(parent[key]))
                )
            case 5 if parent is not None:
                parent[key] = _nested(parent[key], self.random.choice((3, 60, 190, 300)), self.random.random() < 0.5)
            case 6 if parent is not None:
                other, name = self.random.choice(places)
                parent[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(parent[key])
            case 7 if isinstance(value, dict):
                value[self.random.choice(NAMES)] = self._leaf()
            case _:
                return self._leaf()
        return value

    def _leaf(self) -> Any:
        return copy.deepcopy(self.random.choice(LEAVES))

    def _garble(self, data: bytes) -> bytes:
        at = self.random.randrange(len(data) + 1)
        junk = self.random.choice(
            (b"\xff", b"\0", b'"', b"}", b"[" * 500, b"\\ud800", b"\\u12", b"1e99999", b"-", b"\xed\xa0\x80")
        )
        return self.random.choice((data[:at], data[:at] + junk + data[at:], data + data, data[at:] + data[:at]))


def _places(value: Any) -> Any:
    """(container, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _nested(value: Any, depth: int, as_list: bool) -> Any:
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def check_error(path: str, answer: httpx.Response) -> None:
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert set(body) == {"type", "error"}
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]


def check_stream(text: str) -> None:
    """Whole events of JSON, the last as the protocol wants it, none telling of a fault of the server's."""
    events = text.split("\n\n")
    assert events.pop() == ""
    data = [line.removeprefix("data: ") for event in events for line in event.split("\n") if line.startswith("data: ")]
    last = data[-1]
    assert last == "[DONE]" or json.loads(last)["type"] in ("message_stop", "response.completed", "response.incomplete")
    for item in data[:-1] if last == "[DONE]" else data:
        assert json.loads(item) is not None
    assert "internal_error" not in text
    assert '"error":{' not in text


def check_health(server: Server, http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "u"}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "hi"
    assert http.get("/health_generate").status_code == 200
    assert server.client.num_open == 0
    assert server.engine.is_alive()


def test_every_route_with_a_body_is_here() -> None:
    routes = {path.replace("{response_id}", "resp_1") for path, _, methods in ROUTES if set(methods) & {"POST", "PUT"}}
    assert set(BODIES) == routes


def test_bodies_are_valid_before_they_are_broken(server: Server) -> None:
    """Else the fuzz would test the first check of each route alone."""
    with server.http() as http:
        for path, bodies in BODIES.items():
            for body in bodies:
                answer = http.post(path, json=body)
                allowed = (404,) if "cancel" in path else (200,)
                assert answer.status_code in allowed, (path, body, answer.text)


def test_broken_bodies(server: Server) -> None:
    mutator = Mutator(SEED)
    statuses: dict[int, int] = {}
    print(f"seed {SEED}")
    with server.http() as http:
        for number in range(NUM_BODIES):
            path = mutator.random.choice(list(BODIES))
            body = mutator.body(mutator.random.choice(BODIES[path]))
            kind = mutator.content_type()
            answer = http.post(path, content=body, headers={} if kind is None else {"content-type": kind})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            try:
                assert answer.status_code in (200, 400, 404)
                if answer.status_code != 200:
                    check_error(path, answer)
                elif answer.headers.get("content-type", "").startswith("text/event-stream"):
                    check_stream(answer.text)
            except Exception as error:
                raise AssertionError(
                    f"body {number} of seed {SEED}: {path} {body[:3000]!r} {answer.text[:500]}"
                ) from error
            if number % 100 == 99:
                check_health(server, http)
    print(f"{NUM_BODIES} bodies, by status: {statuses}")
    assert statuses[200] > NUM_BODIES / 20, "most bodies are broken in the same place"
