"""Words, sentences and small makers that the tasks share, and what tells train from test."""

# ruff: noqa: E501
from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

from recipes.tiny.data.conversation import Conversation, Message


def stable_hash(*things: Any) -> int:
    return zlib.crc32(repr(things).encode())


def belongs(split: str, share: int, *things: Any) -> bool:
    """True if this combination is of the split; one in `share` is for tests."""
    return (stable_hash(*things) % share == 0) == (split == "test")


def of_split(rng: random.Random, split: str, share: int, make: Callable[[], Any]) -> Any:
    """`make()` until it belongs to the split."""
    while True:
        thing = make()
        if belongs(split, share, thing):
            return thing


# Words

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Mia",
    "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Xavier", "Yara", "Zoe",
    "Adam", "Bella", "Carl", "Diana", "Eric", "Fiona", "Gina", "Hugo", "Ida", "James", "Karen", "Lucas", "Maria",
    "Nina", "Oscar", "Petra", "Robin", "Sara", "Tom", "Ursula", "Vera", "Will", "Lena", "Max", "Julia", "Simon",
    "Ella", "Peter", "Alice", "Frank", "Helen", "Ivan", "Laura", "Mark", "Nora", "Omar",
]  # fmt: skip
ITEMS = [
    "apples", "pears", "oranges", "books", "pencils", "marbles", "stamps", "coins", "stickers", "cards", "shells",
    "stones", "eggs", "cookies", "cakes", "balls", "toys", "flowers", "tomatoes", "carrots", "lemons", "bottles",
    "candles", "buttons", "ribbons", "plates", "cups", "photos", "tickets", "keys", "beads", "nuts", "peaches",
    "plums", "notebooks", "pens", "badges", "muffins", "sandwiches", "bananas",
]  # fmt: skip
SINGULAR = {"tomatoes": "tomato", "peaches": "peach", "sandwiches": "sandwich", "eggs": "egg", "cookies": "cookie"}
CITIES = [
    "Berlin", "Paris", "London", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon", "Athens", "Dublin", "Prague",
    "Warsaw", "Cairo", "Tokyo", "Delhi", "Sydney", "Boston", "Chicago", "Denver", "Toronto", "Lima", "Quito",
    "Havana", "Nairobi", "Seoul", "Beijing", "Moscow", "Kyiv", "Riga", "Tallinn", "Zurich", "Geneva", "Milan",
    "Naples", "Lyon", "Munich", "Hamburg", "Porto", "Krakow", "Ankara",
]  # fmt: skip
COLOURS = [
    "red", "blue", "green", "yellow", "black", "white", "purple", "orange", "pink", "brown", "grey", "silver",
    "golden", "violet", "turquoise",
]  # fmt: skip
ANIMALS = [
    "cat", "dog", "horse", "rabbit", "whale", "tiger", "lion", "bear", "wolf", "fox", "owl", "eagle", "duck",
    "goose", "mouse", "otter", "seal", "goat",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]  # fmt: skip
JOBS = [
    "teacher", "doctor", "baker", "farmer", "painter", "lawyer", "nurse", "driver", "pilot", "cook", "writer",
    "singer", "engineer", "gardener",
]  # fmt: skip
WORDS = sorted({*ITEMS, *ANIMALS, *COLOURS, *JOBS, *["river", "mountain", "window", "table", "chair", "bridge", "garden", "forest", "winter", "summer", "morning", "evening", "letter", "music", "paper", "stone", "street", "market", "island", "harbour", "engine", "wheel", "mirror", "carpet", "pillow", "blanket", "ladder", "hammer", "bucket", "basket", "wagon", "tower", "castle", "village", "valley", "meadow", "desert", "ocean", "storm", "cloud", "thunder", "shadow", "light", "candle", "lantern", "feather", "button", "pocket", "jacket", "sweater", "saddle", "anchor", "compass", "helmet", "shield", "banner", "trumpet", "violin", "drum", "piano", "flute", "paint", "brush", "canvas"]})  # fmt: skip
SYLLABLES = [
    "ba", "be", "bi", "bo", "da", "de", "do", "du", "fa", "fe", "ga", "go", "ha", "ka", "ke", "ki", "ko", "la",
    "le", "li", "lo", "lu", "ma", "me", "mi", "mo", "na", "ne", "no", "pa", "pe", "po", "ra", "re", "ri", "ro",
    "sa", "se", "so", "ta", "te", "ti", "to", "va", "ve", "vi", "wa", "za", "zo",
]  # fmt: skip


def one_of(item: str) -> str:
    return SINGULAR.get(item, item[:-1])


def made_up_name(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def number_of(rng: random.Random, digits: int) -> int:
    """Up to `digits` digits, every length equally often."""
    n = rng.randint(1, digits)
    return rng.randint(10 ** (n - 1) if n > 1 else 0, 10**n - 1)


def system_turn(rng: random.Random) -> list[Message]:
    if rng.random() < 0.75:
        return []
    text = rng.choice([
        "You are a helpful assistant.", "You are a helpful assistant. Answer briefly.", "Be brief.",
        "You are a friendly assistant that answers short questions.", "Answer the question of the user.",
        "You are Baleen, a small and polite assistant.",
    ])  # fmt: skip
    return [{"role": "system", "content": text}]


def answer_turn(reasoning: str, content: str) -> Message:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


def single_question(task: str, rng: random.Random, question: str, work: str, final: str, answer: Any) -> Conversation:
    """One question. Thinking: the work is the reasoning; otherwise it comes first in the answer."""
    thinking = rng.random() < 0.5
    content = final if thinking or not work else f"{work}\n{final}"
    messages = [
        *system_turn(rng),
        {"role": "user", "content": question},
        answer_turn(work or "That is simple.", content),
    ]
    return Conversation(task, messages, answer, thinking)


FILLER_FRAMES = (
    "The {w} near the {x} was {c} and quiet.", "{n} walked to the {w} with a {c} {x}.", "In {y}, the {w} is open all day.",
    "{n} and {m} talked about the {w} for a while.", "A {c} {x} stood beside the {w}.", "Nobody in {y} had seen the {w}.",
    "It was a long {w} and the {x} was cold.", "{n} likes the {w} more than the {x}.", "The {j} of {y} bought a {c} {w}.",
    "Every morning the {j} looked at the {w}.", "There is a {w} behind the {x}.", "{n} asked the {j} for a {w}.",
    "Some people say that the {w} in {y} is {c}.", "When the {w} came, {n} closed the {x}.", "The {x} was made in {y}.",
    "{m} told {n} a story about a {c} {w}.", "After lunch the {j} painted the {w} {c}.", "We saw the {w} from the {x}.",
)  # fmt: skip
_fillers: list[str] = []


def fillers() -> list[str]:
    if not _fillers:
        rng = random.Random(77)
        for _ in range(4000):
            _fillers.append(rng.choice(FILLER_FRAMES).format(
                w=rng.choice(WORDS), x=rng.choice(WORDS), c=rng.choice(COLOURS), n=rng.choice(NAMES), m=rng.choice(NAMES),
                y=rng.choice(CITIES), j=rng.choice(JOBS),
            ))  # fmt: skip
    return _fillers


def spoken(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " and ".join(value) if isinstance(value, list) else str(value)
