"""Facts hidden in a long text: at every depth, one or several at once, with near misses beside them.

A near miss has the same attribute and almost the same name, so an answer from memory of the general place is wrong:
what the indexer leaves out of the top-k cannot be answered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from baleen.evals.problems import Problem

LENGTHS = (1000, 2000, 4000, 8000, 15500)
DEPTHS = (0, 25, 50, 75, 100)  # per cent of the text before the first needle asked for
KINDS = ("single", "multi")
MULTI = 3  # facts asked for at once, spread from the depth over the rest of the text
NEAR_MISSES = 3

_ATTRIBUTES = ("code", "number")
_SYLLABLES = ("ba", "de", "fi", "go", "ka", "le", "mo", "nu", "pa", "ri", "so", "tu", "va", "we", "zo")
_PEOPLE = ("Anna", "Ben", "Clara", "Hugo", "Ida", "Leo", "Maria", "Omar", "Petra", "Tom")
_PLACES = ("Berlin", "Cairo", "Dublin", "Lima", "Oslo", "Paris", "Rome", "Seoul", "Tokyo", "Vienna")
_THINGS = (
    "bridge", "castle", "desert", "forest", "garden", "harbour", "island", "lantern", "market", "meadow", "mirror",
    "ocean", "river", "tower", "valley", "village", "window", "winter",
)  # fmt: skip
_FRAMES = (
    "{n} walked to the {w} with a friend.", "In {y}, the {w} is open all day.", "The {w} near the {x} was quiet.",
    "{n} likes the {w} more than the {x}.", "There is a {w} behind the {x}.", "Nobody in {y} had seen the {w}.",
    "We saw the {w} from the {x}.", "When the {w} came, {n} closed the {x}.", "The {x} was made in {y}.",
)  # fmt: skip


def generate(lengths: Sequence[int], per_cell: int, characters_per_token: float, seed: int = 0) -> list[Problem]:
    """`per_cell` problems of each kind, length and depth.

    lengths               of the prompts in tokens, met within some per cent
    characters_per_token  of the server's tokenizer on such a text
    """
    return [
        _problem(random.Random(f"{seed} {length} {kind} {depth} {i}"), kind, length, depth, characters_per_token)
        for length in lengths
        for kind in KINDS
        for depth in DEPTHS
        for i in range(per_cell)
    ]


def sample_text(characters: int) -> str:
    """Text of the kind that hides the facts, to measure a tokenizer with."""
    return " ".join(_filler(random.Random(1), characters))


def _problem(rng: random.Random, kind: str, length: int, depth: int, characters_per_token: float) -> Problem:
    attribute = rng.choice(_ATTRIBUTES)
    count = MULTI if kind == "multi" else 1
    names = _names(rng, count)
    facts = {name: _value(rng) for name in names}
    misses = {near: _value(rng) for name in names for near in _near(rng, name) if near not in facts}
    lines = _filler(rng, int(length * characters_per_token) - 60 * (len(facts) + len(misses)) - 300)
    for name, value in misses.items():
        lines.insert(rng.randint(0, len(lines)), _fact(attribute, name, value))
    for i, (name, value) in enumerate(facts.items()):
        at = depth / 100 + i * (1 - depth / 100) / count
        lines.insert(round(at * len(lines)), _fact(attribute, name, value))
    asked = [f"the {attribute} of {name}" for name in names]
    question = asked[0] if count == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
    text = "Read this text:\n" + " ".join(lines) + f"\n\nWhat is {question}?"
    return Problem(
        task="needle",
        messages=[{"role": "user", "content": text}],
        answer=list(facts.values()),
        labels={"kind": kind, "length": str(length), "depth": str(depth)},
    )


def _fact(attribute: str, name: str, value: str) -> str:
    return f"The {attribute} of {name} is {value}."


def _value(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def _names(rng: random.Random, count: int) -> list[str]:
    """Made-up names; the near misses of one are never another."""
    stems = rng.sample([a + b for a in _SYLLABLES for b in _SYLLABLES], count)
    return [f"{stem.capitalize()}-{rng.randint(100, 999)}" for stem in stems]


def _near(rng: random.Random, name: str) -> list[str]:
    """The same stem with another number."""
    stem, number = name.split("-")
    others = [n for n in range(100, 1000) if n != int(number)]
    return [f"{stem}-{n}" for n in rng.sample(others, NEAR_MISSES)]


def _filler(rng: random.Random, characters: int) -> list[str]:
    lines: list[str] = []
    while characters > 0:
        w, x = rng.sample(_THINGS, 2)
        lines.append(rng.choice(_FRAMES).format(n=rng.choice(_PEOPLE), y=rng.choice(_PLACES), w=w, x=x))
        characters -= len(lines[-1]) + 1
    return lines
