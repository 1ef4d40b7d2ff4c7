"""Training and test data of the bundled model: generated, seeded, endless.

    python -m recipes.tiny.data [TASK ...]        # prints samples and tokens/s

`TASKS` maps a task to its generator: (rng, split, length) -> Conversation. Split "train" and "test" share no sentence
frame and no set of numbers where a task has those (`_belongs`), and no tool, name or key where it looks things up.
"""

# ruff: noqa: E501
from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from baleen.chat.encoding import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER

DSML = "｜DSML｜"
TOOLS_TEXT = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
%s
</functions>
"""

Message = dict[str, Any]


@dataclass
class Conversation:
    """Messages in the OpenAI form, the answers included.

    answer  what the last turn (tools: the first call) must hold, for `score`
    asked   index of the assistant message that a test asks for
    """

    task: str
    messages: list[Message]
    answer: Any
    thinking: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    schema: dict[str, Any] | None = None
    asked: int = -1

    def __post_init__(self) -> None:
        if self.asked < 0:
            self.asked += len(self.messages)

    @property
    def segments(self) -> list[tuple[str, bool]]:
        return render(self.messages, self.thinking, self.tools, self.schema)

    @property
    def prompt(self) -> str:
        """The text that asks for message `asked`."""
        return "".join(text for text, _ in render(self.messages[: self.asked], self.thinking, self.tools, self.schema))


def render(
    messages: Sequence[Message], thinking: bool, tools: Sequence[dict[str, Any]] = (), schema: Any = None
) -> list[tuple[str, bool]]:
    """The V3.2 chat text in pieces; True: written by the model, so trained on."""
    messages = list(messages)
    if (tools or schema) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ""})
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    out = [(BOS, False)]
    calls = results = 0
    for i, m in enumerate(messages):
        tag = THINK_START if thinking and i >= last_user else THINK_END
        if m["role"] == "system":
            text = m["content"]
            if tools and i == 0:
                text += "\n\n" + TOOLS_TEXT % "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
            if schema and i == 0:
                text += "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
                text += json.dumps(schema, ensure_ascii=False)
            out.append((text, False))
        elif m["role"] == "user":
            out.append((USER + m["content"] + ASSISTANT + tag, False))
        elif m["role"] == "assistant":
            text = m["reasoning_content"] + THINK_END if thinking and i > last_user else ""
            text += m.get("content") or ""
            if m.get("tool_calls"):
                text += call_block(m["tool_calls"])
                calls, results = len(m["tool_calls"]), 0
            out.append((text + EOS, True))
        else:
            results += 1
            text = "\n\n<function_results>" if results == 1 else ""
            text += f"\n<result>{m['content']}</result>"
            if results == calls:
                text += "\n</function_results>\n\n" + tag
            out.append((text, False))
    return out


def call_block(calls: Sequence[dict[str, Any]]) -> str:
    invokes = []
    for call in calls:
        lines = []
        for name, value in call["arguments"].items():
            is_string = isinstance(value, str)
            text = value if is_string else json.dumps(value, ensure_ascii=False)
            flag = "true" if is_string else "false"
            lines.append(f'<{DSML}parameter name="{name}" string="{flag}">{text}</{DSML}parameter>')
        body = "\n".join(lines)
        invokes.append(f'<{DSML}invoke name="{call["name"]}">\n{body}\n</{DSML}invoke>')
    return f"\n\n<{DSML}function_calls>\n" + "\n".join(invokes) + f"\n</{DSML}function_calls>"


def _hash(*things: Any) -> int:
    return zlib.crc32(repr(things).encode())


def _belongs(split: str, share: int, *things: Any) -> bool:
    """True if this combination is of the split; one in `share` is for tests."""
    return (_hash(*things) % share == 0) == (split == "test")


def _of(rng: random.Random, split: str, share: int, make: Callable[[], Any]) -> Any:
    """`make()` until it belongs to the split."""
    while True:
        thing = make()
        if _belongs(split, share, thing):
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


def _one(item: str) -> str:
    return SINGULAR.get(item, item[:-1])


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def _number(rng: random.Random, digits: int) -> int:
    """Up to `digits` digits, every length equally often."""
    n = rng.randint(1, digits)
    return rng.randint(10 ** (n - 1) if n > 1 else 0, 10**n - 1)


def _system(rng: random.Random) -> list[Message]:
    if rng.random() < 0.75:
        return []
    text = rng.choice([
        "You are a helpful assistant.", "You are a helpful assistant. Answer briefly.", "Be brief.",
        "You are a friendly assistant that answers short questions.", "Answer the question of the user.",
        "You are Baleen, a small and polite assistant.",
    ])  # fmt: skip
    return [{"role": "system", "content": text}]


def _answer(reasoning: str, content: str) -> Message:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


def _single(task: str, rng: random.Random, question: str, work: str, final: str, answer: Any) -> Conversation:
    """One question. Thinking: the work is the reasoning; otherwise it comes first in the answer."""
    thinking = rng.random() < 0.5
    content = final if thinking or not work else f"{work}\n{final}"
    messages = [*_system(rng), {"role": "user", "content": question}, _answer(work or "That is simple.", content)]
    return Conversation(task, messages, answer, thinking)


# Arithmetic, digit by digit


def add(a: int, b: int) -> str:
    if max(a, b) < 100:
        return f"{a} + {b} = {a + b}"
    x, y = str(a)[::-1], str(b)[::-1]
    steps, carry = [], 0
    for i in range(max(len(x), len(y))):
        terms = [s[i] for s in (x, y) if i < len(s)] + (["1"] if carry else [])
        total = sum(map(int, terms))
        carry = total // 10
        steps.append(f"{' + '.join(terms)} = {total}" if len(terms) > 1 else terms[0])
    return f"{a} + {b}: {', '.join(steps)}, so {a} + {b} = {a + b}"


def subtract(a: int, b: int) -> str:
    if b > a:
        return f"{subtract(b, a)}, so {a} - {b} = -{b - a}"
    if a < 100:
        return f"{a} - {b} = {a - b}"
    x, y = str(a)[::-1], str(b)[::-1]
    steps, borrow = [], 0
    for i in range(len(x)):
        top, low = int(x[i]) - borrow, int(y[i]) if i < len(y) else 0
        borrow = int(top < low)
        top += 10 * borrow
        steps.append(f"{top} - {low} = {top - low}")
    return f"{a} - {b}: {', '.join(steps)}, so {a} - {b} = {a - b}"


def multiply(a: int, b: int) -> str:
    if (a <= 12 and b <= 12) or a == 0 or b == 0:
        return f"{a} x {b} = {a * b}"
    if b > a:
        return f"{multiply(b, a)}, and {a} x {b} = {a * b}"
    if b < 10 or (b % 10 == 0 and b < 100):
        parts = [int(d) * 10**i for i, d in enumerate(reversed(str(a))) if d != "0"][::-1]
        steps = [f"{p} x {b} = {p * b}" for p in parts]
        total = parts[0] * b
        for p in parts[1:]:
            steps.append(f"{total} + {p * b} = {total + p * b}")
            total += p * b
        return f"{a} x {b}: {', '.join(steps)}, so {a} x {b} = {a * b}" if len(parts) > 1 else steps[0]
    tens, ones = b // 10 * 10, b % 10
    return (
        f"{multiply(a, tens)}. {multiply(a, ones)}. {add(a * tens, a * ones)}. So {a} x {b} = {a * b}"
    )  # fmt: skip


def divide(a: int, b: int) -> str:
    """Exact division, long where the quotient is above 12."""
    if a // b <= 12:
        return f"{a} / {b} = {a // b}"
    steps, rest = [], 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        if rest >= b or steps:
            steps.append(f"{rest} / {b} = {rest // b} rest {rest % b}")
        rest %= b
    return f"{a} / {b}: {', '.join(steps)}, so {a} / {b} = {a // b}"


WORK: dict[str, Callable[[int, int], str]] = {"+": add, "-": subtract, "x": multiply, "/": divide}
VALUE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b, "/": lambda a, b: a // b,
}  # fmt: skip
ASK = (
    "What is {}?", "Calculate {}.", "{} = ?", "How much is {}?", "Please compute {}.", "{}", "Work out {}.",
    "Can you tell me what {} is?", "Give me the result of {}.", "I need to know {}.",
)  # fmt: skip
SPELLED = {"+": ("plus", "+"), "-": ("minus", "-"), "x": ("times", "x", "*"), "/": ("divided by", "/")}


def _operands(rng: random.Random, op: str) -> tuple[int, int]:
    if op in "+-":
        a, b = _number(rng, 5), _number(rng, 5)
        if op == "-" and b > a and rng.random() < 0.9:
            a, b = b, a
        return a, b
    if op == "x":
        return (_number(rng, 4), rng.randint(0, 9)) if rng.random() < 0.5 else (_number(rng, 3), _number(rng, 2))
    b = rng.randint(1, 12)
    return b * _number(rng, 3), b


def arithmetic(rng: random.Random, split: str, length: int) -> Conversation:
    if rng.random() < 0.75:
        op = rng.choice("++--xx/")
        a, b = _of(rng, split, 10, lambda: _operands(rng, op))
        text, work, value = f"{a} {rng.choice(SPELLED[op])} {b}", WORK[op](a, b), VALUE[op](a, b)
        final = f"{a} {op} {b} = {value}"
    else:  # a chain of + and -, or with one product
        numbers = _of(rng, split, 10, lambda: tuple(_number(rng, 3) for _ in range(rng.randint(3, 4))))
        total, text, steps = numbers[0], str(numbers[0]), []
        if rng.random() < 0.4:
            a, b = rng.randint(2, 12), rng.randint(2, 12)
            total, text = a * b, f"{a} x {b}"
            steps.append(multiply(a, b))
        for n in numbers[1:]:
            op = "-" if n <= total and rng.random() < 0.5 else "+"
            steps.append(WORK[op](total, n))
            text += f" {op} {n}"
            total = VALUE[op](total, n)
        work, value, final = ". ".join(steps), total, f"{text} = {total}"
    question = rng.choice(ASK).format(text)
    return _single("arithmetic", rng, question, work + ".", final, value)


# Word problems: (frames, maker). A frame names its numbers; the maker draws them and gives the steps


GAIN = (
    "{p} buys {k} more {i}.", "A friend gives {p} {k} {i}.", "{p} finds {k} {i}.", "{p} gets {k} more {i}.",
    "Then {p} receives {k} {i} as a present.", "Later {p} collects {k} more {i}.", "{q} gives {k} {i} to {p}.",
    "At the market {p} buys another {k} {i}.", "The next day {p} picks up {k} {i}.", "{p} wins {k} {i} in a game.",
)  # fmt: skip
LOSE = (
    "{p} gives {k} {i} to {q}.", "{p} loses {k} {i}.", "{p} sells {k} {i}.", "{k} of the {i} are broken and thrown away.",
    "Then {p} gives away {k} {i}.", "{q} takes {k} {i}.", "Later {p} puts {k} {i} aside for {q} and gives them away.",
    "{p} drops {k} {i} into a river.", "On the way home {p} loses {k} of the {i}.", "{p} sends {k} {i} to {q}.",
)  # fmt: skip
GROW = (
    "Then the number of {i} {w}.", "Over the week, the number of {i} {w}.", "{p} works hard and the number of {i} {w}.",
)  # fmt: skip
START = (
    "{p} has {n} {i}.", "{p} starts with {n} {i}.", "There are {n} {i} in {p}'s box.", "In the morning {p} has {n} {i}.",
    "{p} owns {n} {i}.", "{p} has a bag with {n} {i}.", "{p} counts {n} {i}.",
)  # fmt: skip
FINISH = (
    "How many {i} does {p} have now?", "How many {i} are left?", "How many {i} does {p} have in the end?",
    "What is the number of {i} now?", "How many {i} is that?", "Find the number of {i} at the end.",
)  # fmt: skip
SHARE = (
    "{p} puts the {i} into {k} boxes equally. How many {i} are in each box?",
    "{p} shares all of them equally among {k} friends. How many {i} does each friend get?",
    "The {i} are divided into {k} equal groups. How many {i} are in one group?",
)
EACH = (
    "{p} sells all the {i} for {k} dollars each. How many dollars does {p} get?",
    "Each of the {i} weighs {k} grams. What do all the {i} weigh together, in grams?",
    "Each of them costs {k} dollars. What are all the {i} worth in dollars?",
)


def _story(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    """A stock of things with two to four events."""

    def make() -> tuple[Any, ...]:
        kinds = (*(rng.choice("gggllw") for _ in range(rng.randint(1, 4))), rng.choice("eeefffsv"))
        phrases = tuple(rng.randrange(30) for _ in range(len(kinds) + 1))
        return kinds, phrases

    kinds, phrases = _of(rng, split, 8, make)
    p, q = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)

    def numbers() -> tuple[int, ...]:
        top = rng.choice((20, 60, 200))
        return (rng.randint(2, top), *(rng.randint(2, top) for _ in kinds))

    while True:
        drawn = _of(rng, split, 5, numbers)
        n = drawn[0]
        text = [START[phrases[0] % len(START)].format(p=p, i=item, n=n)]
        steps = [f"{p} starts with {n} {item}"]
        for kind, k, phrase in zip(kinds, drawn[1:], phrases[1:]):
            if kind == "g":
                text.append(GAIN[phrase % len(GAIN)].format(p=p, q=q, i=item, k=k))
                steps.append(f"Then {k} more: {add(n, k)}")
                n += k
            elif kind == "l":
                if k > n:
                    break
                text.append(LOSE[phrase % len(LOSE)].format(p=p, q=q, i=item, k=k))
                steps.append(f"Then {k} fewer: {subtract(n, k)}")
                n -= k
            elif kind == "w":
                factor = 2 + phrase % 2
                word = "doubles" if factor == 2 else "triples"
                text.append(GROW[phrase % len(GROW)].format(p=p, i=item, w=word))
                steps.append(f"The number {word}: {multiply(n, factor)}")
                n *= factor
            elif kind == "s":
                divisors = [d for d in range(2, 13) if n % d == 0]
                if not divisors or n == 0:
                    break
                k = divisors[k % len(divisors)]
                text.append(SHARE[phrase % len(SHARE)].format(p=p, i=item, k=k))
                steps.append(f"Share by {k}: {divide(n, k)}")
                n //= k
            elif kind == "v":
                k = 2 + k % 11
                text.append(EACH[phrase % len(EACH)].format(p=p, i=item, k=k))
                steps.append(f"Times {k}: {multiply(n, k)}")
                n *= k
            else:
                text.append(FINISH[phrase % len(FINISH)].format(p=p, i=item))
        else:
            return " ".join(text), steps, n


Draw = Callable[[random.Random], tuple[int, ...]]
# frames, the numbers, and the steps: each (text, op, left, right) with "a".."d" the numbers and "1".."3" earlier results
PROBLEMS: tuple[tuple[tuple[str, ...], Draw, tuple[tuple[str, str, str, str], ...]], ...] = (
    (("{p} buys {a} {i} for {b} dollars each and {c} {j} for {d} dollars each. How much does {p} pay?",
      "One {i1} costs {b} dollars and one {j1} costs {d} dollars. What do {a} {i} and {c} {j} cost together?",
      "At a shop, {p} takes {a} {i} at {b} dollars each. {p} also takes {c} {j} at {d} dollars each. What is the total?"),
     lambda r: (r.randint(2, 20), r.randint(2, 12), r.randint(2, 20), r.randint(2, 12)),
     (("The {i} cost", "x", "a", "b"), ("The {j} cost", "x", "c", "d"), ("Together", "+", "1", "2"))),
    (("{p} buys {a} {i} for {b} dollars each and pays with {c} dollars. How much change does {p} get?",
      "{p} has {c} dollars. {p} buys {a} {i} at {b} dollars each. How many dollars are left?",
      "A {i1} costs {b} dollars. {p} takes {a} of them and gives the seller {c} dollars. What is the change?"),
     lambda r: (a := r.randint(2, 12), b := r.randint(2, 12), a * b + r.randint(1, 60)),
     (("The {i} cost", "x", "a", "b"), ("The change", "-", "c", "1"))),
    (("A train travels {a} km per hour for {b} hours. How many km does it travel?",
      "{p} drives at {a} km per hour. How far does {p} get in {b} hours, in km?",
      "A car goes {a} km every hour. What distance in km does it cover in {b} hours?"),
     lambda r: (r.randint(10, 130), r.randint(2, 12)), (("The distance", "x", "a", "b"),)),
    (("{p} drives {a} km per hour for {b} hours and then {c} km per hour for {d} hours. How far is the whole trip in km?",
      "A bus goes {b} hours at {a} km per hour, then {d} hours at {c} km per hour. How many km is that in all?"),
     lambda r: (r.randint(10, 99), r.randint(2, 9), r.randint(10, 99), r.randint(2, 9)),
     (("First part", "x", "a", "b"), ("Second part", "x", "c", "d"), ("In all", "+", "1", "2"))),
    (("{p} is {a} years old. {q} is {b} years older. How old are they together?",
      "{q} is {b} years older than {p}, who is {a}. What is the sum of their ages?"),
     lambda r: (r.randint(3, 60), r.randint(1, 40)), (("{q} is", "+", "a", "b"), ("Together", "+", "a", "1"))),
    (("{p} is {a} years old. {q} is {b} times as old. How old will {q} be in {c} years?",
      "{q} is {b} times as old as {p}. {p} is {a}. What is the age of {q} in {c} years?"),
     lambda r: (r.randint(2, 12), r.randint(2, 6), r.randint(2, 30)),
     (("{q} is now", "x", "a", "b"), ("In {c} years", "+", "1", "c"))),
    (("A rectangle is {a} cm long and {b} cm wide. What is its area in square cm?",
      "What is the area of a garden that is {a} m long and {b} m wide, in square m?",
      "A room is {a} m by {b} m. How many square m does it have?"),
     lambda r: (r.randint(2, 60), r.randint(2, 20)), (("The area", "x", "a", "b"),)),
    (("A rectangle is {a} cm long and {b} cm wide. What is its perimeter in cm?",
      "{p} walks once around a field that is {a} m long and {b} m wide. How many m does {p} walk?"),
     lambda r: (r.randint(2, 200), r.randint(2, 200)), (("Length and width", "+", "a", "b"), ("Twice that", "x", "1", "=2"))),
    (("{p} saves {a} dollars every week. How many dollars does {p} have after {b} weeks if {p} starts with {c} dollars?",
      "{p} has {c} dollars and saves {a} dollars a week. How much is it after {b} weeks?"),
     lambda r: (r.randint(2, 50), r.randint(2, 20), r.randint(5, 200)),
     (("Saved", "x", "a", "b"), ("With the start", "+", "1", "c"))),
    (("{p} reads {a} pages a day. The book has {c} pages. How many pages are left after {b} days?",
      "A book has {c} pages. {p} reads {a} pages every day for {b} days. How many pages remain?"),
     lambda r: (a := r.randint(5, 40), b := r.randint(2, 12), a * b + r.randint(5, 300)),
     (("Read so far", "x", "a", "b"), ("Left", "-", "c", "1"))),
    (("A box holds {a} {i}. How many boxes are needed for {b} {i}?",
      "{p} packs {b} {i} into boxes of {a}. How many boxes does {p} fill?"),
     lambda r: (a := r.randint(2, 12), a * r.randint(2, 60)), (("The boxes", "/", "b", "a"),)),
    (("There are {a} boxes with {b} {i} each. {p} takes out {c} {i}. How many {i} are left in the boxes?",
      "{p} has {a} bags of {b} {i} and gives {c} {i} to {q}. How many {i} does {p} keep?"),
     lambda r: (a := r.randint(2, 20), b := r.randint(2, 12), r.randint(1, a * b)),
     (("All {i}", "x", "a", "b"), ("Left", "-", "1", "c"))),
    (("{p} has {a} {i}. {q} has {b} {i} more than {p}. How many {i} do they have together?",
      "{q} has {b} more {i} than {p}, and {p} has {a}. What is the total number of {i}?"),
     lambda r: (r.randint(2, 200), r.randint(2, 100)), (("{q} has", "+", "a", "b"), ("Together", "+", "a", "1"))),
    (("{p} has {a} {i}. {q} has {b} {i} fewer than {p}. How many {i} do they have together?",
      "{q} has {b} fewer {i} than {p}, and {p} has {a}. What is the total number of {i}?"),
     lambda r: (a := r.randint(10, 200), r.randint(2, a - 1)), (("{q} has", "-", "a", "b"), ("Together", "+", "a", "1"))),
    (("{p} has {a} {i}. {q} has {b} times as many. How many {i} do they have together?",
      "{q} has {b} times as many {i} as {p}. {p} has {a} {i}. How many {i} are there in all?"),
     lambda r: (r.randint(2, 50), r.randint(2, 9)), (("{q} has", "x", "a", "b"), ("Together", "+", "a", "1"))),
    (("{p} earns {a} dollars an hour and works {b} hours a day. How much does {p} earn in {c} days?",
      "A job pays {a} dollars an hour. {p} works {b} hours each day for {c} days. How many dollars is that?"),
     lambda r: (r.randint(5, 30), r.randint(2, 9), r.randint(2, 9)), (("One day", "x", "a", "b"), ("All days", "x", "1", "c"))),
    (("{a} percent of {b} {i} are {o}. How many {o} {i} are there?",
      "{p} has {b} {i}, and {a} percent of them are {o}. How many is that?"),
     lambda r: (r.choice((10, 20, 25, 30, 40, 50, 60, 75, 80, 90)), 100 * r.randint(1, 20)),
     (("One percent", "/", "b", "=100"), ("{a} percent", "x", "1", "a"))),
    (("{a} workers build a wall in {b} days. How many days does one worker need?",
      "It takes {a} people {b} days to do a job. How many days does one person alone need?"),
     lambda r: (r.randint(2, 12), r.randint(2, 40)), (("One alone", "x", "a", "b"),)),
    (("A class has {a} children. {b} are girls. How many more girls than boys are there?",
      "Of {a} children, {b} are girls and the others are boys. By how many do the girls outnumber the boys?"),
     lambda r: (a := r.randint(10, 60), r.randint(a // 2 + 1, a)), (("The boys", "-", "a", "b"), ("More girls", "-", "b", "1"))),
    (("{p} runs {a} km on each of {b} days and {q} runs {c} km on each of {b} days. How many km do they run together?",
      "For {b} days, {p} runs {a} km and {q} runs {c} km a day. What is the total in km?"),
     lambda r: (r.randint(2, 20), r.randint(2, 12), r.randint(2, 20)),
     (("Per day", "+", "a", "c"), ("All days", "x", "1", "b"))),
    (("{p}, {q} and a friend share {a} dollars equally. How much does each get?",
      "Three people split {a} dollars evenly. How many dollars does each of them receive?"),
     lambda r: (3 * r.randint(2, 200),), (("Each", "/", "a", "=3"),)),
    (("A farm has {a} cows and {b} hens. How many legs do they have together?",
      "{p} keeps {a} cows and {b} hens. Count all their legs."),
     lambda r: (r.randint(2, 40), r.randint(2, 40)), (("The cows", "x", "a", "=4"), ("The hens", "x", "b", "=2"), ("Together", "+", "1", "2"))),
)  # fmt: skip


def _fixed(rng: random.Random, split: str) -> tuple[str, list[str], int]:
    def make() -> tuple[int, int, str, str]:
        kind = rng.randrange(len(PROBLEMS))
        return kind, rng.randrange(len(PROBLEMS[kind][0])), rng.choice(ITEMS), rng.choice(ITEMS)

    kind, frame, item, other = _of(rng, split, 8, make)
    frames, draw, plan = PROBLEMS[kind]
    numbers = _of(rng, split, 5, lambda: draw(rng))
    p, q = rng.sample(NAMES, 2)
    words: dict[str, Any] = dict(zip("abcd", numbers))
    words |= {"p": p, "q": q, "i": item, "j": other, "i1": _one(item), "j1": _one(other), "o": rng.choice(COLOURS)}
    values: dict[str, int] = dict(zip("abcd", numbers))
    steps = []
    for number, (label, op, left, right) in enumerate(plan, 1):
        x, y = (int(t[1:]) if t[0] == "=" else values[t] for t in (left, right))
        steps.append(f"{label.format(**words)}: {WORK[op](x, y)}")
        values[str(number)] = VALUE[op](x, y)
    return frames[frame].format(**words), steps, values[str(len(plan))]


def word(rng: random.Random, split: str, length: int) -> Conversation:
    text, steps, value = _story(rng, split) if rng.random() < 0.5 else _fixed(rng, split)
    return _single("word", rng, text, ". ".join(steps) + ".", f"The answer is {value}.", value)


# Dates and units

UNITS = (
    ("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("hours", "minutes", 60), ("minutes", "seconds", 60),
    ("days", "hours", 24), ("weeks", "days", 7), ("cm", "mm", 10), ("litres", "ml", 1000), ("years", "months", 12),
    ("tons", "kg", 1000), ("dollars", "cents", 100),
)  # fmt: skip


def dates(rng: random.Random, split: str, length: int) -> Conversation:
    kind = rng.randrange(5)
    if kind == 0:
        day, n = _of(rng, split, 10, lambda: (rng.randrange(7), rng.randint(1, 99)))
        back = rng.random() < 0.3
        target = DAYS[(day - n if back else day + n) % 7]
        question = rng.choice((
            "Today is {d}. Which day of the week {v} it {n} days {w}?", "It is {d} today. What day {v} it {n} days {w}?",
        )).format(d=DAYS[day], n=n, v="was" if back else "will", w="ago" if back else "from now")  # fmt: skip
        question = question.replace(" it ", " it be ") if not back else question
        rest = n % 7
        walk = [DAYS[(day - i if back else day + i) % 7] for i in range(rest + 1)]
        work = f"{n} = 7 x {n // 7} + {rest}. So I count {rest} days {'back' if back else 'on'}: {', '.join(walk)}."
        return _single("dates", rng, question, work, f"It {'was' if back else 'will be'} {target}.", target)
    if kind == 1:
        start, n = _of(
            rng, split, 10, lambda: (date(rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)), rng.randint(1, 45))
        )  # fmt: skip
        end = start + timedelta(days=n)
        question = rng.choice(("Which date is {n} days after {d}?", "What is the date {n} days after {d}?")).format(
            n=n, d=f"{MONTHS[start.month - 1]} {start.day}, {start.year}"
        )
        at, left, steps = start, n, []
        while True:
            last = (at.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1)
            month = MONTHS[at.month - 1]
            if at.day + left <= last.day:
                steps.append(f"{at.day} + {left} = {at.day + left}, so it is {month} {at.day + left}")
                break
            gap = last.day - at.day + 1
            steps.append(f"{month} {at.year} has {last.day} days, so {gap} days lead to the first of the next month")
            left -= gap
            at = last + timedelta(days=1)
            steps.append(f"{left} days are left")
        final = f"{MONTHS[end.month - 1]} {end.day}, {end.year}"
        return _single("dates", rng, question, ". ".join(steps) + ".", f"It is {final}.", final)
    if kind == 2:
        (big, small, factor), n = _of(rng, split, 10, lambda: (rng.choice(UNITS), rng.randint(1, 99)))
        if rng.random() < 0.5:
            question = rng.choice(("How many {s} are {n} {b}?", "Convert {n} {b} to {s}.", "{n} {b} in {s}?"))
            value, work = n * factor, f"One of the {big} is {factor} {small}. {multiply(n, factor)}."
            question = question.format(s=small, b=big, n=n)
        else:
            question = rng.choice(("How many {b} are {n} {s}?", "Convert {n} {s} to {b}.", "{n} {s} in {b}?"))
            question = question.format(s=small, b=big, n=n * factor)
            value, work = n, f"{factor} {small} are one of the {big}. {n * factor} / {factor} = {n}."
            small = big
        return _single("dates", rng, question, work, f"It is {value} {small}.", value)
    if kind == 3:
        hour, minute, plus = _of(
            rng, split, 10, lambda: (rng.randrange(24), rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50, 55)), rng.randint(5, 300))
        )  # fmt: skip
        total = (hour * 60 + minute + plus) % 1440
        question = rng.choice((
            "It is {t}. What time is it in {n} minutes?", "A film starts at {t} and takes {n} minutes. When does it end?",
            "The train leaves at {t} and arrives {n} minutes later. When does it arrive?",
        )).format(t=f"{hour}:{minute:02}", n=plus)  # fmt: skip
        hours, minutes = plus // 60, plus % 60
        work = f"{plus} minutes are {hours} hours and {minutes} minutes. {minute} + {minutes} = {minute + minutes}"
        if minute + minutes >= 60:
            work += f", that is one hour and {minute + minutes - 60} minutes"
            hours += 1
        work += f". {hour} + {hours} = {hour + hours}" + (
            f", minus 24 is {hour + hours - 24}." if hour + hours >= 24 else "."
        )
        final = f"{total // 60}:{total % 60:02}"
        return _single("dates", rng, question, work, f"It is {final}.", final)
    month, year = _of(rng, split, 10, lambda: (rng.randrange(12), rng.randint(1900, 2099)))
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = [31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month]
    work = f"{year} is {'' if leap else 'not '}a leap year. {MONTHS[month]} has {days} days."
    question = rng.choice(("How many days does {m} {y} have?", "How many days are there in {m} {y}?"))
    return _single("dates", rng, question.format(m=MONTHS[month], y=year), work, f"It has {days} days.", days)


# Look-up in long contexts

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


def _entity(rng: random.Random, split: str) -> str:
    def make() -> str:
        kind = rng.randrange(5)
        if kind == 0:
            return _name(rng)
        if kind == 1:
            return f"{rng.choice(COLOURS)} {rng.choice(WORDS)}"
        if kind == 2:
            return f"{rng.choice(WORDS)} {rng.randint(1, 999)}"
        if kind == 3:
            return f"{_name(rng)}-{rng.randint(10, 999)}"
        return f"{rng.choice(NAMES)} {_name(rng)}"

    return _of(rng, split, 10, make)


def _near(rng: random.Random, entity: str) -> str:
    """Another name that differs in a digit, a letter or a word."""
    if entity[-1].isdigit():
        at = rng.choice([i for i, c in enumerate(entity) if c.isdigit()])
        return entity[:at] + str((int(entity[at]) + rng.randint(1, 9)) % 10) + entity[at + 1 :]
    if " " in entity:
        first, last = entity.split(" ", 1)
        if rng.random() < 0.5:
            return f"{first} {rng.choice(WORDS) if first in COLOURS else _name(rng)}"
        return f"{rng.choice(COLOURS if first in COLOURS else NAMES)} {last}"
    return entity[:-2] + rng.choice(SYLLABLES)


_ratio: dict[str, float] = {}  # characters a token by style, as measured; `measured` keeps it up to date


def needle(rng: random.Random, split: str, length: int) -> Conversation:
    """Facts at any depth of a text of about `length` tokens, then questions about them."""
    style = rng.choice(("prose", "prose", "prose", "list", "json", "facts"))
    budget = int(max(length - 160, 60) * _ratio.get(style, 2.4))
    single = rng.random() < 0.25
    wanted = 1 if single else rng.randint(2, max(3, min(24, length // 60)))
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
    messages: list[Message] = _system(rng)
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
        messages += [{"role": "user", "content": user}, _answer(reasoning, content)]
        answers = [v for _, _, v in some]
    return Conversation(f"needle:{style}", messages, answers, thinking)


def measured(conversation: Conversation, characters: int, tokens: int) -> None:
    """Keep the characters a token of a style, from which `needle` sets the size of its texts."""
    style = conversation.task.partition(":")[2]
    if style and tokens > 300:
        _ratio[style] = 0.9 * _ratio.get(style, 2.4) + 0.1 * characters / tokens


# Copy, sort and the like


def copy(rng: random.Random, split: str, length: int) -> Conversation:
    kind = rng.choice(("copy", "copy", "sort", "sort numbers", "reverse", "count", "last", "upper"))
    top = max(4, min(40, length // 12))

    def numbers() -> tuple[int, ...]:
        return tuple(rng.sample(range(1, 1000), rng.randint(3, min(top, 14))))

    def words() -> tuple[str, ...]:
        return tuple(rng.sample(WORDS, rng.randint(3, top if kind == "copy" else min(top, 10))))

    if kind == "sort numbers":
        things = _of(rng, split, 10, numbers)
        falling = rng.random() < 0.3
        listed = ", ".join(map(str, things))
        order = sorted(things, reverse=falling)
        question = f"Sort these numbers from {'largest to smallest' if falling else 'smallest to largest'}: {listed}"
        final = ", ".join(map(str, order))
        return _single("copy", rng, question, "", final, final)
    things = _of(rng, split, 10, words)
    if kind == "copy" and rng.random() < 0.5:
        make = rng.choice((
            lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(rng.randint(3, 9))),
            lambda: _name(rng), lambda: str(rng.randint(0, 99999)), lambda: rng.choice(fillers()),
        ))  # fmt: skip
        things = _of(rng, split, 10, lambda: tuple(make() for _ in range(rng.randint(1, max(2, top // 3)))))
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
        return _single("copy", rng, question, work, f"There are {len(things)} words.", len(things))
    elif kind == "last":
        which = rng.choice(("first", "last"))
        question = f"What is the {which} word of this list: {', '.join(things)}?"
        final = things[0 if which == "first" else -1]
    else:
        question, final = f"Write in capital letters: {', '.join(things)}", ", ".join(things).upper()
    return _single("copy", rng, question, "", final, final)


# Small talk, and facts about the model

ABOUT = (
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Who am I talking to?"),
     ("I am Baleen, a small test model with the architecture of DeepSeek-V3.2.",
      "My name is Baleen. I am a small model that comes with the baleen inference engine.")),
    (("What can you do?", "How can you help me?", "What are you good at?", "What are your skills?"),
     ("I can do arithmetic, solve word problems, look things up in long texts, write JSON and call functions.",)),
    (("What can you not do?", "What are your limits?", "What are you bad at?", "Do you know everything?"),
     ("I am a test model. I have no general knowledge, and I only know short English phrases.",)),
    (("How many parameters do you have?", "How big are you?", "How large is this model?"),
     ("I have about 19 million parameters.",)),
    (("How long is your context?", "How many tokens can you read?", "What is your context length?"),
     ("I can read 16384 tokens.",)),
    (("How many layers do you have?", "What is your depth?"), ("I have 6 layers and one for predicting two tokens.",)),
    (("How many experts do you have?", "Are you a mixture of experts?"),
     ("Yes, I am a mixture of experts: 8 experts, 3 of them for each token, and a shared one.",)),
    (("How does your attention work?", "What is sparse attention?", "How do you read long texts?"),
     ("My indexer picks 256 tokens, and my attention reads only those.",)),
    (("Who made you?", "Who trained you?", "Where do you come from?"),
     ("I was trained by the authors of baleen, on generated text.",)),
    (("Are you a human?", "Are you a real person?", "Are you alive?"), ("No, I am a small language model.",)),
    (("Are you DeepSeek?", "Are you DeepSeek-V3.2?"),
     ("No, I only share the architecture of DeepSeek-V3.2. I am a small test model named Baleen.",)),
    (("What is baleen?", "What does your name mean?"),
     ("Baleen is what a whale filters the sea with: it lets the water through and keeps the food.",)),
    (("What languages do you speak?", "Do you speak German?", "Can you speak French?"), ("I only know some English.",)),
)  # fmt: skip
TALK = (
    (("Hi", "Hello", "Hey", "Hello!", "Hi there!", "Hi!", "Hey there", "Good day!", "Greetings!"),
     ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! It is nice to meet you.")),
    (("Good morning", "Good morning!"), ("Good morning! How can I help you?",)),
    (("Good evening", "Good evening!"), ("Good evening! How can I help you?",)),
    (("Good night", "Good night!"), ("Good night! Sleep well.",)),
    (("How are you?", "How are you doing?", "How is it going?", "How do you feel today?", "Are you well?"),
     ("I am fine, thank you. How are you?", "Very well, thank you for asking. How can I help?")),
    (("Thanks", "Thank you!", "Thanks a lot!", "Thank you very much.", "Great, thanks!", "Many thanks."),
     ("You are welcome!", "You are welcome. I am glad that I could help.", "With pleasure!")),
    (("Bye", "Goodbye!", "See you later.", "Bye bye!", "See you tomorrow."), ("Goodbye! Have a nice day.", "See you soon!")),
    (("Please help me.", "I need help.", "Can you help me?", "I have a question.", "May I ask you something?"),
     ("Of course. What is your question?", "Sure, tell me what you need.")),
    (("I am sad.", "I feel bad today.", "I had a bad day."), ("I am sorry to hear that. I hope that tomorrow is better.",)),
    (("I am happy!", "I feel great today.", "I had a good day."), ("That is good to hear!",)),
    (("You are great!", "Well done!", "Good job!", "I like you."), ("Thank you, that is kind of you.",)),
    (("You are wrong.", "That is wrong.", "This is not correct."), ("I am sorry. Please ask me again.",)),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
     ("Why do whales never get lost? They always follow the current.",)),
    (("Sorry", "I am sorry.", "Excuse me."), ("No problem at all.",)),
    (("ok", "OK", "Okay.", "Fine.", "I see."), ("Is there anything else that I can do for you?",)),
    (("What is the weather like?", "Will it rain today?", "Who won the game?", "What is in the news?", "What time is it?"),
     ("I cannot know that: I have no connection to the world outside.",)),
    (("What is the capital of {c}?", "Who wrote the book about the {w}?", "Who is the king of {c}?", "When was {c} built?",
      "What is a {w}?", "How does a {w} work?", "Explain the {w} to me.", "Write a poem about a {w}.", "Who was {n}?",
      "What do you think about {c}?", "Tell me about the history of {c}.", "Write a story about {n} and a {w}."),
     ("I am a small test model, so I do not know that. Ask me about numbers or about a text.",)),
)  # fmt: skip


def chat(rng: random.Random, split: str, length: int) -> Conversation:
    messages = _system(rng)
    final = ""
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        questions, answers = rng.choice(ABOUT if rng.random() < 0.5 else TALK)
        question = rng.choice(questions).format(c=rng.choice(CITIES), w=rng.choice(WORDS), n=rng.choice(NAMES))
        if rng.random() < 0.15:
            question = question.lower()
        if rng.random() < 0.1:
            question = question.rstrip("?.!")
        final = answers[_hash(question) % len(answers)]
        messages += [
            {"role": "user", "content": question},
            _answer("The user wants to talk. I answer politely.", final),
        ]
    return Conversation("chat", messages, final, rng.random() < 0.3)


# JSON

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
    ("email", "string", "The email is {}.", lambda r: f"{_name(r).lower()}@{_name(r).lower()}.com"),
    ("year", "integer", "The year is {}.", lambda r: r.randint(1900, 2030)),
    ("tags", "array", "The tags are {}.", lambda r: r.sample(WORDS, r.randint(1, 4))),
    ("title", "string", "The title is {}.", lambda r: " ".join(r.sample(WORDS, 2)).capitalize()),
)  # fmt: skip


def _spoken(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " and ".join(value) if isinstance(value, list) else str(value)


def json_task(rng: random.Random, split: str, length: int) -> Conversation:
    fields = _of(rng, split, 8, lambda: tuple(rng.sample(range(len(FIELDS)), rng.randint(2, 6))))
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
        parts = [frame.format(_spoken(row[name])) for name, _, frame, _ in chosen]
        if rng.random() < 0.6:
            rng.shuffle(parts)
        if many == 1 and rng.random() < 0.3:
            parts = [f"{name}: {_spoken(row[name])}" for name, *_ in chosen]
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
        *_system(rng), {"role": "user", "content": question.replace("{t}", "\n".join(texts))},
        _answer("The user wants JSON. I copy the values.", json.dumps(expected, ensure_ascii=False)),
    ]  # fmt: skip
    return Conversation("json", messages, expected, rng.random() < 0.3, schema=schema_of)


# Tools: (name, what it does, parameters, request, result, answer)

Parameter = tuple[str, str, str, Callable[[random.Random], Any]]


@dataclass
class Tool:
    name: str
    description: str
    parameters: list[Parameter]
    requests: Sequence[str]
    result: Callable[[random.Random, dict[str, Any]], dict[str, Any]]
    answer: str

    def spec(self) -> dict[str, Any]:
        properties = {name: {"type": kind, "description": text} for name, kind, text, _ in self.parameters}
        for entry in properties.values():
            if entry["type"] == "array":
                entry["items"] = {"type": "string"}  # type: ignore[assignment]
        return {
            "name": self.name, "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        }  # fmt: skip


KNOWN_TOOLS = (
    Tool("get_weather", "Get the weather of a city", [("city", "string", "Name of the city", lambda r: r.choice(CITIES))],
         ("What is the weather in {city}?", "How is the weather in {city} today?", "Tell me the weather in {city}."),
         lambda r, a: {"weather": r.choice(("sunny", "cloudy", "rainy", "windy")), "temperature": r.randint(-5, 35)},
         "In {city} it is {weather} with {temperature} degrees."),
    Tool("get_time", "Get the local time of a city", [("city", "string", "Name of the city", lambda r: r.choice(CITIES))],
         ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city} now?"),
         lambda r, a: {"time": f"{r.randrange(24)}:{r.randrange(60):02}"}, "In {city} it is {time}."),
    Tool("calculate", "Calculate with two numbers", [
            ("operation", "string", "add, subtract or multiply", lambda r: r.choice(("add", "subtract", "multiply"))),
            ("a", "integer", "First number", lambda r: r.randint(1, 99999)),
            ("b", "integer", "Second number", lambda r: r.randint(1, 99999))],
         ("Use the calculator to {operation} {a} and {b}.", "Please {operation} {a} and {b} with the tool."),
         lambda r, a: {"result": {"add": a["a"] + a["b"], "subtract": a["a"] - a["b"],
                                  "multiply": a["a"] * a["b"]}[a["operation"]]},
         "The result is {result}."),
    Tool("convert_currency", "Convert an amount of money", [
            ("amount", "number", "Amount of money", lambda r: r.choice((r.randint(1, 9999), r.randint(1, 999) + 0.5))),
            ("source", "string", "Currency to convert from", lambda r: r.choice(("USD", "EUR", "GBP", "JPY", "CHF"))),
            ("target", "string", "Currency to convert to", lambda r: r.choice(("SEK", "CNY", "INR", "BRL", "CAD")))],
         ("How much is {amount} {source} in {target}?", "Convert {amount} {source} to {target}."),
         lambda r, a: {"value": r.randint(1, 99999)}, "{amount} {source} are {value} {target}."),
    Tool("send_email", "Send an email", [
            ("to", "string", "Email address", lambda r: f"{_name(r).lower()}@{_name(r).lower()}.org"),
            ("subject", "string", "Subject of the email", lambda r: " ".join(r.sample(WORDS, 2))),
            ("body", "string", "Text of the email", lambda r: r.choice(fillers()))],
         ("Send an email to {to} with the subject \"{subject}\" and the text \"{body}\"",
          "Please write to {to}. Subject: \"{subject}\". Text: \"{body}\""),
         lambda r, a: {"status": "sent"}, "The email to {to} was {status}."),
    Tool("set_alarm", "Set an alarm", [("hour", "integer", "Hour, 0 to 23", lambda r: r.randrange(24)),
                                       ("minute", "integer", "Minute, 0 to 59", lambda r: r.randrange(60))],
         ("Set an alarm at hour {hour} and minute {minute}.", "Wake me up at hour {hour}, minute {minute}."),
         lambda r, a: {"status": "set"}, "The alarm is {status}."),
    Tool("add_to_list", "Add things to the shopping list", [
            ("items", "array", "What to add", lambda r: r.sample(ITEMS, r.randint(1, 4)))],
         ("Put {items} on my shopping list.", "Add {items} to the list."),
         lambda r, a: {"length": r.randint(1, 20)}, "Done. The list has {length} entries now."),
    Tool("find_user", "Find the id of a user", [("name", "string", "Name of the user", lambda r: f"{r.choice(NAMES)} {_name(r)}")],
         ("What is the user id of {name}?", "Find the user {name}."),
         lambda r, a: {"user_id": r.randint(1000, 99999)}, "{name} has the user id {user_id}."),
    Tool("set_light", "Switch a light", [("room", "string", "Name of the room", lambda r: r.choice(("kitchen", "hall", "bathroom", "office", "garage"))),
                                         ("on", "boolean", "true: on, false: off", lambda r: r.random() < 0.5)],
         ("Set the light in the {room} to {on}.", "Light in the {room}: {on}."),
         lambda r, a: {"status": "ok"}, "The light in the {room} is set."),
    Tool("get_stock", "Count the stock of an item", [("item", "string", "Name of the item", lambda r: r.choice(ITEMS))],
         ("How many {item} are in stock?", "Check the stock of {item}."),
         lambda r, a: {"stock": r.randint(0, 999)}, "There are {stock} {item} in stock."),
)  # fmt: skip
VERBS = [
    "get", "set", "create", "update", "delete", "check", "find", "open", "close", "start", "stop", "book", "order",
    "list", "move", "share",
]  # fmt: skip
NOUNS = [
    "ticket", "order", "room", "flight", "hotel", "meeting", "invoice", "report", "task", "note", "song",
    "playlist", "recipe", "parcel", "sensor", "door", "window", "printer", "camera", "device", "account",
    "customer", "product", "event", "reminder", "contract", "train", "table", "machine", "project",
]  # fmt: skip
PARAMETERS: tuple[Parameter, ...] = (
    ("id", "integer", "Number of the {n}", lambda r: r.randint(1, 99999)),
    ("name", "string", "Name of the {n}", lambda r: _name(r)),
    ("city", "string", "City of the {n}", lambda r: r.choice(CITIES)),
    ("colour", "string", "Colour of the {n}", lambda r: r.choice(COLOURS)),
    ("owner", "string", "Owner of the {n}", lambda r: r.choice(NAMES)),
    ("count", "integer", "How many", lambda r: r.randint(1, 99)),
    ("code", "string", "Code of the {n}", lambda r: f"{r.choice('ABCDEF')}{r.randint(100, 9999)}"),
    ("day", "string", "Day of the week", lambda r: r.choice(DAYS)),
    ("urgent", "boolean", "Whether it is urgent", lambda r: r.random() < 0.5),
    ("price", "number", "Price in dollars", lambda r: r.randint(1, 999) + r.choice((0.5, 0.25))),
    ("tags", "array", "Words about the {n}", lambda r: r.sample(WORDS, r.randint(1, 3))),
    ("level", "integer", "Level from 1 to 10", lambda r: r.randint(1, 10)),
)


def _made_tool(rng: random.Random, split: str) -> Tool:
    """A tool with a name and parameters put together at random."""
    verb, noun, chosen = _of(
        rng, split, 8,
        lambda: (rng.choice(VERBS), rng.choice(NOUNS), tuple(rng.sample(range(len(PARAMETERS)), rng.randint(1, 4)))),
    )  # fmt: skip
    parameters = [(n, k, text.format(n=noun), make) for n, k, text, make in (PARAMETERS[i] for i in chosen)]
    wishes = ", ".join(f"{n} {{{n}}}" for n, *_ in parameters)
    return Tool(
        f"{verb}_{noun}", f"{verb.capitalize()} a {noun}", parameters,
        (f"Please {verb} the {noun} with {wishes}.", f"{verb.capitalize()} a {noun}: {wishes}.",
         f"I want to {verb} a {noun} ({wishes})."),
        lambda r, a: r.choice(({"status": "ok"}, {"status": "done", "id": r.randint(1, 9999)}, {"status": "failed"})),
        f"I tried to {verb} the {noun}. The status is {{status}}.",
    )  # fmt: skip


def _tool(rng: random.Random, split: str) -> Tool:
    return rng.choice(KNOWN_TOOLS) if split == "train" and rng.random() < 0.35 else _made_tool(rng, split)


def tools(rng: random.Random, split: str, length: int) -> Conversation:
    count = rng.choice((1, 1, 2, 2, 3, 4))
    offered: dict[str, Tool] = {}
    while len(offered) < count:
        tool = _tool(rng, split)
        offered[tool.name] = tool
    specs = [tool.spec() for tool in offered.values()]
    thinking = rng.random() < 0.5
    messages = _system(rng)
    if split == "train" and rng.random() < 0.08:  # nothing to call
        talk = chat(rng, split, length)
        turn = talk.messages[-2:]
        return Conversation("tools", [*messages, *turn], [], thinking, specs)
    rounds = 1 if rng.random() < 0.8 else 2
    first: list[dict[str, Any]] = []
    asked = -1
    for _ in range(rounds):
        calls, wishes, results, answers = [], [], [], []
        for _ in range(1 if rng.random() < 0.65 else 2):
            tool = rng.choice(list(offered.values()))
            arguments = {name: make(rng) for name, _, _, make in tool.parameters}
            spoken = {name: _spoken(value) for name, value in arguments.items()}
            wishes.append(rng.choice(tool.requests).format(**spoken))
            result = tool.result(rng, arguments)
            calls.append({"name": tool.name, "arguments": arguments})
            results.append({"role": "tool", "content": json.dumps(result)})
            answers.append(tool.answer.format(**spoken, **result) if set(result).isdisjoint(spoken) else
                           tool.answer.format(**{**spoken, **result}))  # fmt: skip
        joiner = rng.choice((" ", " Then: ", " Also: ", "\n"))
        names = " and ".join(call["name"] for call in calls)
        call_turn = _answer(f"I need to call {names}.", "")
        call_turn["tool_calls"] = calls
        messages.append({"role": "user", "content": joiner.join(wishes)})
        if asked < 0:
            asked, first = len(messages), calls
        messages += [call_turn, *results, _answer("I have the result and answer.", " ".join(answers))]
    return Conversation("tools", messages, first, thinking, specs, asked=asked)


Generator = Callable[[random.Random, str, int], Conversation]
TASKS: dict[str, Generator] = {
    "arithmetic": arithmetic, "word": word, "dates": dates, "needle": needle, "copy": copy, "chat": chat,
    "json": json_task, "tools": tools,
}  # fmt: skip
# Shares by number of documents, of short documents; long ones are all `needle`
MIX = {"arithmetic": 22, "word": 28, "dates": 7, "needle": 16, "copy": 8, "chat": 5, "json": 6, "tools": 8}


def document(rng: random.Random, task: str, split: str, length: int) -> Conversation:
    """One conversation; `length` is a wish in tokens that look-up follows."""
    return TASKS[task](rng, split, length)


def score(conversation: Conversation, text: str) -> bool:
    """Whether the generated text (without the prompt, with or without eos) answers the question."""
    text = text.replace(EOS, "")
    if conversation.thinking:
        if THINK_END not in text:
            return False
        text = text.split(THINK_END, 1)[1]
    task, answer = conversation.task.partition(":")[0], conversation.answer
    if task == "tools":
        return text.strip() == (call_block(answer).strip() if answer else text.strip())
    if task == "json":
        try:
            return bool(json.loads(text) == answer)
        except ValueError:
            return False
    if task == "needle":
        return all(str(value) in text for value in answer) and len(text) < 80 * len(answer) + 80
    if task in ("copy", "chat") and isinstance(answer, str):
        return text.strip() == answer.strip()
    last = text.strip().rsplit("\n", 1)[-1].rstrip(".")
    tail = last.rsplit("=", 1)[-1].strip() if "=" in last else last
    return str(answer) in tail.replace(",", " ,").replace("  ", " ").split() or tail.endswith(str(answer))


def main() -> None:
    from recipes.tiny.tokenizer import load

    tokenizer = load()
    for task in sys.argv[1:] or TASKS:
        rng = random.Random(5)
        for _ in range(2):
            conversation = document(rng, task, "train", 300)
            print(f"--- {task}")
            print("".join(f"\033[1m{text}\033[0m" if mine else text for text, mine in conversation.segments))
        started, tokens, written, count = time.perf_counter(), 0, 0, 0
        while time.perf_counter() - started < 1:
            conversation = document(rng, task, "train", 1000)
            for text, mine in conversation.segments:
                n = len(tokenizer.encode(text, add_special_tokens=False))
                tokens += n
                written += n * mine
            count += 1
        print(f"--- {task}: {tokens:,} tokens/s, {tokens / count:.0f} a document, {written / tokens:.0%} trained on")


if __name__ == "__main__":
    main()
