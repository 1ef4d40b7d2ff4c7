"""The prompt text, letter for letter, against texts written out by hand from the wire format."""

from __future__ import annotations

from typing import Any

import pytest

from baleen.chat.encoding import EncodingError, encode_messages, render

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
HELLO = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
    {"role": "user", "content": "1+1=?"},
]


def test_published_check_vector() -> None:
    """The model card's example: bos, User, hello, Assistant, </think>, ..., eos, User, 1+1=?, Assistant, <think>."""
    assert encode_messages(HELLO, thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )


def test_chat_mode_ends_in_closed_thinking() -> None:
    assert encode_messages(HELLO, thinking=False) == (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜></think>"
    )


def test_system_is_raw_wherever_it_stands() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": "Now be long."},
        {"role": "user", "content": "c"},
    ]
    assert encode_messages(messages, thinking=False) == (
        f"{BOS}Be brief.<｜User｜>a<｜Assistant｜></think>b{EOS}Now be long.<｜User｜>c<｜Assistant｜></think>"
    )
    empty = [{"role": "system", "content": None}, {"role": "user", "content": "a"}]
    assert encode_messages(empty, thinking=True) == f"{BOS}<｜User｜>a<｜Assistant｜><think>"


def test_developer_is_a_user_turn_with_a_heading() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}]
    assert encode_messages(messages, thinking=True) == (
        f"{BOS}<｜User｜>a<｜Assistant｜></think><｜User｜>\n\n# The user's message is: b<｜Assistant｜><think>"
    )


def test_thinking_forgets_earlier_developer_turns() -> None:
    messages = [{"role": "developer", "content": "old"}, {"role": "user", "content": "new"}]
    assert "old" in encode_messages(messages, thinking=False)
    assert encode_messages(messages, thinking=True) == f"{BOS}<｜User｜>new<｜Assistant｜><think>"


def test_reasoning_after_the_last_user_turn_stays() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    assert render(messages, thinking=True) == f"{BOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}"
    assert render(messages, thinking=False) == f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}"
    with pytest.raises(EncodingError) as caught:
        render([messages[0], {"role": "assistant", "content": "a"}], thinking=True)
    assert caught.value.field == "messages[1].reasoning_content"


def test_text_parts_are_joined_by_one_space() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}, {"type": "text", "text": "c"}]
    text = encode_messages([{"role": "user", "content": parts}], thinking=False)
    assert text == f"{BOS}<｜User｜>a b\n c<｜Assistant｜></think>"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([{"role": "system", "content": "s"}], "messages[0].role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages[1].role"),
        ([{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}], "messages[0].role"),
        ([{"content": "a"}, {"role": "user", "content": "b"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}, {"role": "user", "content": "b"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 3}], "messages[1].content"),
        ([{"role": "developer", "content": ""}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "messages[0].content[1].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "developer", "content": None}, {"role": "user", "content": 1}], "messages[1].content"),
    ],
)
def test_errors_name_the_field(messages: list[dict[str, Any]], field: str) -> None:
    with pytest.raises(EncodingError) as caught:
        encode_messages(messages, thinking=True)
    assert caught.value.field == field
