"""The generated data: seeded, train and test apart, and scorers that accept the reference answer and nothing else."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from recipes.tiny import data
from recipes.tiny.data import Conversation
from recipes.tiny.data.conversation import render
from recipes.tiny.data.needle import needle_at
from recipes.tiny.data.words import of_split

ALL = sorted(data.TASKS)
SPLITS = ("train", "test")


def some(task: str, split: str, count: int = 200) -> list[Conversation]:
    rng = random.Random(f"{task} {split}")
    return [data.document(rng, task, split, 300) for _ in range(count)]


def reference(c: Conversation) -> str:
    """What the model should write where `c.prompt` ends."""
    upto = "".join(text for text, _ in render(c.messages[: c.asked + 1], c.thinking, c.tools, c.schema))
    return upto[len(c.prompt) :]


@pytest.mark.parametrize("task", ALL)
def test_a_seed_gives_the_same_documents(task: str) -> None:
    first, second = ([c.segments for c in some(task, "train", 20)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("task", [t for t in ALL if t not in ("chat", "tools")])
def test_no_question_is_in_both_splits(task: str) -> None:
    train, test = ({c.messages[-2]["content"] for c in some(task, split, 400)} for split in SPLITS)
    assert not train & test
    assert len(test) > 200


def test_splits_share_nothing() -> None:
    rng = random.Random(0)
    train, test = ({of_split(rng, split, 5, lambda: rng.randrange(50)) for _ in range(500)} for split in SPLITS)
    assert not train & test
    assert len(train) > 2 * len(test) > 0


def test_no_tool_is_in_both_splits() -> None:
    train, test = ({json.dumps(t) for c in some("tools", split) for t in c.tools} for split in SPLITS)
    assert not train & test


@pytest.mark.parametrize("task", ALL)
def test_the_reference_is_right_and_anothers_is_wrong(task: str) -> None:
    conversations = some(task, "test", 100)
    for c, other in pairwise(conversations):
        assert c.prompt.endswith("<think>" if c.thinking else "</think>")
        assert data.score(c, reference(c))
        values = c.answer if isinstance(c.answer, list) else [c.answer]
        if c.answer != other.answer and not any(str(value) in reference(other) for value in values):
            answer = reference(other).rpartition("</think>")[2]
            assert not data.score(c, ("hm</think>" if c.thinking else "") + answer)


def test_only_what_the_model_writes_is_trained_on() -> None:
    for task in ALL:
        for c in some(task, "train", 20):
            trained = [text for text, mine in c.segments if mine]
            assert len(trained) == sum(m["role"] == "assistant" for m in c.messages)
            assert all(text.endswith("<｜end▁of▁sentence｜>") for text in trained)


def test_valid_json() -> None:
    c = Conversation(
        "json", [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}], {"a": 1, "b": "x"}
    )
    assert data.is_valid_json(c, '{"a": 2, "b": "y"}')
    assert not data.score(c, '{"a": 2, "b": "y"}')
    assert not data.is_valid_json(c, '{"a": 2}')
    assert not data.is_valid_json(c, '{"a": 2, "b": "y"')


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_lies_at_its_depth(depth: float) -> None:
    c = needle_at(random.Random(1), "test", 20000, depth)
    text = c.messages[0]["content"]
    fact = c.messages[1]["content"].removeprefix("The ").partition(" of ")[2].partition(" is ")[0]
    places = [i for i in range(len(text)) if text.startswith(fact, i)][:-1]  # the last one is the question
    assert any(abs(at / len(text) - depth) < 0.05 for at in places)
    assert data.score(c, reference(c))
