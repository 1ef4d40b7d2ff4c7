"""Look-up in long contexts: facts at any depth, near misses beside them, questions after or before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from recipes.tiny.data.conversation import Conversation, Message
from recipes.tiny.data.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    NAMES,
    SYLLABLES,
    WORDS,
    answer_turn,
    fillers,
    made_up_name,
    of_split,
    system_turn,
)

ATTRIBUTES: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("code", lambda r: str(r.randint(1000, 99999))),
    ("password", lambda r: "".join(r.choice("abcdefghkmnprstuvwxyz") for _ in range(5))),
    ("number", lambda r: str(r.randint(100, 999999))),
    ("colour", lambda r: r.choice(COLOURS)),
    ("city", lambda r: r.choice(CITIES)),
    ("owner", lambda r: r.choice(NAMES)),
    ("animal", lambda r: r.choice(ANIMALS)),
    ("price", lambda r: f"{r.randint(1, 999)} dollars"),
    ("secret word", lambda r: r.choice(WORDS)),
    ("key", lambda r: f"{r.choice('ABCDEFGH')}{r.randint(10, 99)}-{r.randint(100, 999)}"),
)
FACT = (
    "The {a} of {e} is {v}.", "Note that the {a} of {e} is {v}.", "{e} has the {a} {v}.", "For {e}, the {a} is {v}.",
    "Remember: the {a} of {e} is {v}.",
)  # fmt: skip


def _entity(rng: random.Random, split: str) -> str:
    def make() -> str:
        kind = rng.randrange(5)
        if kind == 0:
            return made_up_name(rng)
        if kind == 1:
            return f"{rng.choice(COLOURS)} {rng.choice(WORDS)}"
        if kind == 2:
            return f"{rng.choice(WORDS)} {rng.randint(1, 999)}"
        if kind == 3:
            return f"{made_up_name(rng)}-{rng.randint(10, 999)}"
        return f"{rng.choice(NAMES)} {made_up_name(rng)}"

    return of_split(rng, split, 10, make)


def _near(rng: random.Random, entity: str) -> str:
    """Another name that differs in a digit, a letter or a word."""
    if entity[-1].isdigit():
        at = rng.choice([i for i, c in enumerate(entity) if c.isdigit()])
        return entity[:at] + str((int(entity[at]) + rng.randint(1, 9)) % 10) + entity[at + 1 :]
    if " " in entity:
        first, last = entity.split(" ", 1)
        if rng.random() < 0.5:
            return f"{first} {rng.choice(WORDS) if first in COLOURS else made_up_name(rng)}"
        return f"{rng.choice(COLOURS if first in COLOURS else NAMES)} {last}"
    return entity[:-2] + rng.choice(SYLLABLES)


_ratio: dict[str, float] = {}  # characters a token by style, as measured; `measured` keeps it up to date


def needle(rng: random.Random, split: str, length: int) -> Conversation:
    """Facts at any depth of a text of about `length` tokens, then questions about them."""
    style = rng.choice(("prose", "prose", "prose", "list", "json", "facts"))
    budget = int(max(length - 160, 60) * _ratio.get(style, 2.4))
    single = rng.random() < 0.25
    wanted = 1 if single else rng.randint(2, max(3, min(24 if split == "test" else 48, length // 60)))
    facts: dict[tuple[str, str], str] = {}
    attributes = rng.sample(ATTRIBUTES, rng.randint(1, 4))

    def fact(entity: str) -> tuple[str, str, str] | None:
        attribute, make = rng.choice(attributes)
        if (entity, attribute) in facts:
            return None
        facts[entity, attribute] = make(rng)
        return entity, attribute, facts[entity, attribute]

    entities = [_entity(rng, split) for _ in range(wanted)]
    chosen = [f for e in entities if (f := fact(e))]
    lines = [*chosen]
    for e in entities:
        for _ in range(rng.randint(0, 3)):
            if f := fact(e if rng.random() < 0.4 else _near(rng, e)):
                lines.append(f)
    frame = rng.choice(FACT)
    write: Callable[[tuple[str, str, str]], str]
    if style == "list":
        write = lambda f: f"- {f[1]} of {f[0]}: {f[2]}"  # noqa: E731
    elif style == "json":
        write = lambda f: json.dumps({"name": f[0], f[1]: f[2]})  # noqa: E731
    else:
        write = lambda f: frame.format(e=f[0], a=f[1], v=f[2])  # noqa: E731
    texts = [write(f) for f in lines]
    size = sum(map(len, texts)) + 60 * len(chosen)
    if style == "prose":
        pool = fillers()
        extra = []
        while size < budget:
            sentence = pool[int(rng.random() * len(pool))]
            extra.append(sentence)
            size += len(sentence) + 1
        for text in texts:  # any depth, the ends included
            extra.insert(rng.randint(0, len(extra)), text)
        body = " ".join(extra)
        if rng.random() < 0.5:
            body = body.replace(". The ", ".\nThe ")
    else:
        while size < budget:
            for _ in range(20):
                e = _near(rng, rng.choice(entities)) if rng.random() < 0.3 else _entity(rng, split)
                if f := fact(e):
                    texts.append(write(f))
                    size += len(texts[-1]) + 1
        rng.shuffle(texts)
        body = (" " if style == "facts" and rng.random() < 0.5 else "\n").join(texts)
    intro = rng.choice(("Read this text:", "Here is some text:", "Text:", "Remember the following.", "Look at this:"))
    ask_two = (lambda: rng.random() < 0.25) if len(chosen) > 1 else (lambda: False)
    rng.shuffle(chosen)
    messages: list[Message] = system_turn(rng)
    thinking = rng.random() < 0.4
    answers: list[str] = []
    at = 0
    while at < len(chosen):
        some = chosen[at : at + (rng.randint(2, 3) if ask_two() else 1)]
        at += len(some)
        if len(some) == 1:
            e, a, v = some[0]
            question = rng.choice((
                "What is the {a} of {e}?", "Tell me the {a} of {e}.", "Which {a} does {e} have?", "{e}: what {a}?",
            )).format(e=e, a=a)  # fmt: skip
            content = f"The {a} of {e} is {v}."
        else:
            parts = [f"the {a} of {e}" for e, a, _ in some]
            question = "What is " + ", ".join(parts[:-1]) + f" and {parts[-1]}?"
            content = " ".join(f"The {a} of {e} is {v}." for e, a, v in some)
        reasoning = "I look for " + " and ".join(f"the {a} of {e}" for e, a, _ in some) + ". "
        reasoning += " ".join(f"The text says: {write(f)}" for f in some)
        if len(messages) and messages[-1]["role"] == "assistant":
            user = question
        else:
            user = f"{intro}\n{body}\n\n{question}" if rng.random() < 0.8 else f"{question}\n\n{intro}\n{body}"
        messages += [{"role": "user", "content": user}, answer_turn(reasoning, content)]
        answers = [v for _, _, v in some]
    return Conversation(f"needle:{style}", messages, answers, thinking)


def needle_at(rng: random.Random, split: str, characters: int, depth: float) -> Conversation:
    """One fact at a depth (0: the beginning, 1: the end) of prose of about that size, near misses anywhere."""
    entity = _entity(rng, split)
    attribute, make = rng.choice(ATTRIBUTES)
    value = make(rng)
    frame = rng.choice(FACT)
    body: list[str] = []
    size = 0
    while size < characters - 400:
        body.append(rng.choice(fillers()))
        size += len(body[-1]) + 1
    for _ in range(3):
        miss = _near(rng, entity)
        if miss != entity:
            body.insert(rng.randint(0, len(body)), frame.format(e=miss, a=attribute, v=make(rng)))
    body.insert(round(depth * len(body)), frame.format(e=entity, a=attribute, v=value))
    question = f"Read this text:\n{' '.join(body)}\n\nWhat is the {attribute} of {entity}?"
    messages = [{"role": "user", "content": question}, answer_turn("", f"The {attribute} of {entity} is {value}.")]
    return Conversation("needle:prose", messages, [value])


def measured(conversation: Conversation, characters: int, tokens: int) -> None:
    """Keep the characters a token of a style, from which `needle` sets the size of its texts."""
    style = conversation.task.partition(":")[2]
    if style and tokens > 300:
        _ratio[style] = 0.9 * _ratio.get(style, 2.4) + 0.1 * characters / tokens
