"""JSON objects from told facts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from recipes.tiny.data.conversation import Conversation
from recipes.tiny.data.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    JOBS,
    NAMES,
    WORDS,
    answer_turn,
    made_up_name,
    of_split,
    spoken,
    system_turn,
)

FIELDS: tuple[tuple[str, str, str, Callable[[random.Random], Any]], ...] = (
    ("name", "string", "The name is {}.", lambda r: r.choice(NAMES)),
    ("age", "integer", "The age is {}.", lambda r: r.randint(1, 99)),
    ("city", "string", "The city is {}.", lambda r: r.choice(CITIES)),
    ("job", "string", "The job is {}.", lambda r: r.choice(JOBS)),
    ("colour", "string", "The colour is {}.", lambda r: r.choice(COLOURS)),
    ("animal", "string", "The animal is a {}.", lambda r: r.choice(ANIMALS)),
    ("price", "number", "The price is {} dollars.", lambda r: round(r.randint(1, 99) + r.randint(1, 99) / 100, 2)),
    ("count", "integer", "The count is {}.", lambda r: r.randint(1, 999)),
    ("active", "boolean", "It is {} that it is active.", lambda r: r.random() < 0.5),
    ("code", "string", "The code is {}.", lambda r: f"{r.choice('ABCDEF')}{r.randint(100, 9999)}"),
    ("email", "string", "The email is {}.", lambda r: f"{made_up_name(r).lower()}@{made_up_name(r).lower()}.com"),
    ("year", "integer", "The year is {}.", lambda r: r.randint(1900, 2030)),
    ("tags", "array", "The tags are {}.", lambda r: r.sample(WORDS, r.randint(1, 4))),
    ("title", "string", "The title is {}.", lambda r: " ".join(r.sample(WORDS, 2)).capitalize()),
)  # fmt: skip


def json_task(rng: random.Random, split: str, length: int) -> Conversation:
    fields = of_split(rng, split, 8, lambda: tuple(rng.sample(range(len(FIELDS)), rng.randint(2, 6))))
    chosen = [FIELDS[i] for i in fields]
    many = rng.randint(2, 4) if rng.random() < 0.25 else 1
    rows = [{name: make(rng) for name, _, _, make in chosen} for _ in range(many)]
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} | ({"items": {"type": "string"}} if kind == "array" else {})
                       for name, kind, _, _ in chosen},
        "required": [name for name, *_ in chosen],
    }  # fmt: skip
    texts = []
    for row in rows:
        parts = [frame.format(spoken(row[name])) for name, _, frame, _ in chosen]
        if rng.random() < 0.6:
            rng.shuffle(parts)
        if many == 1 and rng.random() < 0.3:
            parts = [f"{name}: {spoken(row[name])}" for name, *_ in chosen]
        texts.append(rng.choice((" ", "\n")).join(parts))
    expected: Any = rows[0] if many == 1 else rows
    keys = ", ".join(name for name, *_ in chosen)
    in_prompt = many == 1 and rng.random() < 0.5
    if in_prompt:
        question = rng.choice(("{t}", "Extract the data: {t}", "Fill in the fields.\n{t}", "Read this: {t}"))
        schema_of = schema
    else:
        what = "a JSON object" if many == 1 else "a JSON list of objects"
        question = rng.choice((
            f"Write {what} with the keys {keys}. {{t}}", f"Answer only with {what} with the keys {keys}.\n{{t}}",
            f"{{t}}\nGive me this as {what} with the keys {keys}.", f"Turn this into {what} (keys: {keys}): {{t}}",
        ))  # fmt: skip
        schema_of = None
    messages = [
        *system_turn(rng), {"role": "user", "content": question.replace("{t}", "\n".join(texts))},
        answer_turn("The user wants JSON. I copy the values.", json.dumps(expected, ensure_ascii=False)),
    ]  # fmt: skip
    return Conversation("json", messages, expected, rng.random() < 0.3, schema=schema_of)
