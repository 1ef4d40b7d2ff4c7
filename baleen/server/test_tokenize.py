"""/tokenize gives the ids that the engine gets; /detokenize the text back."""

from __future__ import annotations

from typing import Any

import pytest

from baleen.messages import unpack_ids
from baleen.server.conftest import CONTEXT, Server

HI = [{"role": "user", "content": "hi ü"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}


def post(server: Server, path: str, body: Any, status: int = 200) -> Any:
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_prompt(server: Server, path: str) -> None:
    ids = server.tokenizer.encode("hello<think>")
    assert post(server, path, {"prompt": "hello<think>"}) == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": CONTEXT,
    }
    several = post(server, path, {"prompt": ["hello<think>", ""], "model": "tiny-whale", "add_special_tokens": True})
    assert several == {"tokens": [ids, []], "count": [len(ids), 0], "max_model_len": CONTEXT}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"chat_template_kwargs": {"thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"reasoning_effort": "high"},
        {"response_format": SCHEMA},
        {"messages": [*HI, {"role": "assistant", "content": "He"}], "continue_final_message": True},
        {"messages": [*HI, {"role": "assistant", "content": "He", "prefix": True}]},
        {"input_ids": [5, 6, 7]},
    ],
)
def test_messages_are_what_the_engine_gets(server: Server, fields: dict[str, Any]) -> None:
    body = {"messages": HI, **fields}
    answer = post(server, "/tokenize", body)
    assert answer["count"] == len(answer["tokens"])
    script = server.play("abc")
    post(server, "/v1/chat/completions", {"model": "default", **body})
    assert unpack_ids(script.requests[-1].input_ids) == answer["tokens"]


@pytest.mark.parametrize(
    "fields",
    [{"messages": HI, "tools": TOOLS}, {"messages": [{"role": "system", "content": "", "tools": TOOLS}, *HI]}],
)
def test_tools_and_thinking_show_in_the_ids(server: Server, fields: dict[str, Any]) -> None:
    tokenizer = server.tokenizer
    answer = post(server, "/tokenize", {**fields, "chat_template_kwargs": {"thinking": True}})
    text = b"".join(map(tokenizer.token_bytes, answer["tokens"])).decode()
    assert '{"name": "now", "parameters": {"type": "object", "properties": {}}}\n</functions>' in text
    assert text.endswith("<｜User｜>hi ü<｜Assistant｜><think>")
    assert answer["count"] > CONTEXT  # nothing is generated: a prompt may be too long to be answered


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_back_to_text(server: Server, path: str) -> None:
    text = "<｜begin▁of▁sentence｜><｜User｜>größe 世界</think>｜DSML｜"
    ids = server.tokenizer.encode(text)
    assert post(server, path, {"tokens": ids, "skip_special_tokens": False}) == {"text": text}
    shown = "<｜User｜>größe 世界</think>"
    assert post(server, path, {"tokens": ids, "model": "default"}) == {"text": shown}
    assert post(server, path, {"tokens": [ids, [], ids[1:2]]}) == {"text": [shown, "", "<｜User｜>"]}
    assert post(server, path, {"tokens": []}) == {"text": ""}
    half = server.tokenizer.encode("茶")[:1]
    assert post(server, path, {"tokens": half})["text"] == "\ufffd"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": ["a", 3]}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": ["a"]}, "messages[0]"),
        ("/tokenize", {"messages": [{"role": "robot"}]}, "messages[0].role"),
        ("/tokenize", {"messages": HI, "chat_template_kwargs": {"style": 1}}, "chat_template_kwargs.style"),
        ("/tokenize", {"messages": HI, "input_ids": [10**6]}, "input_ids"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, "tokens"),
        ("/detokenize", {"tokens": [[1], 2]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [[1], [-1]]}, "tokens[1]"),
    ],
)
def test_bad_bodies_are_refused_by_name(server: Server, path: str, body: Any, param: str) -> None:
    error = post(server, path, body, 400)["error"]
    assert error["param"] == param


def test_another_model_is_unknown(server: Server) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert post(server, path, {"model": "gpt", **body}, 404)["error"]["code"] == "model_not_found"


def test_a_lone_surrogate_is_no_json(server: Server) -> None:
    for path in ("/tokenize", "/v1/chat/completions"):
        with server.http() as http:
            body = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
            response = http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert "not JSON" in response.json()["error"]["message"]
