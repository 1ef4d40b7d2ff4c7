"""What of a chat request decides its prompt, besides the messages."""

from __future__ import annotations

from typing import Any

import pytest

from baleen.server.conftest import Server

HI = [{"role": "user", "content": "hi"}]


def message(server: Server, **fields: Any) -> dict[str, Any]:
    with server.http() as http:
        response = http.post("/v1/chat/completions", json={"model": "default", "messages": HI, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()["choices"][0]["message"]
    return answer


def test_own_ids_that_end_in_an_open_think_tag_start_inside_reasoning(server: Server) -> None:
    server.play("r</think>a")
    opened = message(server, input_ids=server.tokenizer.encode("any<think>"))
    assert (opened["reasoning_content"], opened["content"]) == ("r", "a")
    closed = message(server, input_ids=server.tokenizer.encode("any<think></think>"))
    assert closed["reasoning_content"] is None
    assert closed["content"].endswith("a")


@pytest.mark.parametrize("kwargs", [{"reasoning_effort": "high"}, {"thinking": True, "lang": None}])
def test_switches_are_no_template_arguments(server: Server, kwargs: dict[str, Any]) -> None:
    server.play("r</think>a")
    assert message(server, chat_template_kwargs=kwargs)["reasoning_content"] == "r"


def test_a_beginning_with_its_reasoning_is_continued_as_content(server: Server) -> None:
    server.play("b")
    begun = [*HI, {"role": "assistant", "content": "a", "reasoning_content": "r", "prefix": True}]
    answer = message(server, messages=begun, chat_template_kwargs={"thinking": True})
    assert (answer["reasoning_content"], answer["content"]) == (None, "b")
