"""Copy, sort, reverse, count."""

from __future__ import annotations

import random

from recipes.tiny.data.conversation import Conversation
from recipes.tiny.data.words import WORDS, fillers, made_up_name, of_split, single_question

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZäöüßéèñçåøæšžłαβγδπабвгде中文日本語한국✓€°½🐋🙂🎉"
STRANGE = (
    "naïve café", "smörgåsbord", "Zürich", "El Niño", "Привет", "日本語", "你好", "안녕", "x² + y²", "a_b-c.d", "50 %",
    "#tag", "C++", "<b>bold</b>", "{\"a\": [1, 2]}", "foo(bar, 3)", "https://example.org/a?b=c",
    "🐋", "it's", "\"quoted\"",
)  # fmt: skip


def copy(rng: random.Random, split: str, length: int) -> Conversation:
    kind = rng.choice(("copy", "copy", "sort", "sort numbers", "reverse", "count", "last", "upper"))
    top = max(4, min(40, length // 12))

    def numbers() -> tuple[int, ...]:
        return tuple(rng.sample(range(1, 1000), rng.randint(3, min(top, 10))))

    def words() -> tuple[str, ...]:
        return tuple(rng.sample(WORDS, rng.randint(3, top if kind == "copy" else min(top, 8))))

    if kind == "sort numbers":
        things = of_split(rng, split, 10, numbers)
        falling = rng.random() < 0.3
        listed = ", ".join(map(str, things))
        order = sorted(things, reverse=falling)
        question = f"Sort these numbers from {'largest to smallest' if falling else 'smallest to largest'}: {listed}"
        final = ", ".join(map(str, order))
        return single_question("copy", rng, question, "", final, final)
    things = of_split(rng, split, 10, words)
    if kind == "copy" and rng.random() < 0.5:
        make = rng.choice((
            lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(rng.randint(3, 9))),
            lambda: made_up_name(rng), lambda: str(rng.randint(0, 99999)), lambda: rng.choice(fillers()),
            lambda: f"{made_up_name(rng).lower()}@{made_up_name(rng).lower()}.com", lambda: rng.choice(STRANGE),
            lambda: "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 9))),
            lambda: f"{rng.choice('ABCDEFGH')}{rng.randint(10, 99999)}",
        ))  # fmt: skip
        things = of_split(rng, split, 10, lambda: tuple(make() for _ in range(rng.randint(1, max(2, top // 3)))))
    joined = rng.choice((", ", " ", "\n")).join(things)
    if kind == "copy":
        question = rng.choice((
            "Repeat exactly: {}", "Copy this text: {}", "Say exactly this: {}", "Write the following again: {}",
            "Repeat after me: {}", "Copy:\n{}",
        )).format(joined)  # fmt: skip
        final = joined
    elif kind == "sort":
        question, final = f"Sort these words alphabetically: {', '.join(things)}", ", ".join(sorted(things))
    elif kind == "reverse":
        question, final = f"Write this list in reverse order: {', '.join(things)}", ", ".join(reversed(things))
    elif kind == "count":
        work = ", ".join(f"{n} {t}" for n, t in enumerate(things, 1)) + "."
        question = f"How many words are in this list: {', '.join(things)}?"
        return single_question("copy", rng, question, work, f"There are {len(things)} words.", len(things))
    elif kind == "last":
        which = rng.choice(("first", "last"))
        question = f"What is the {which} word of this list: {', '.join(things)}?"
        final = things[0 if which == "first" else -1]
    else:
        question, final = f"Write in capital letters: {', '.join(things)}", ", ".join(things).upper()
    return single_question("copy", rng, question, "", final, final)
