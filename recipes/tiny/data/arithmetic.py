"""Arithmetic, worked digit by digit."""

from __future__ import annotations

import random
from collections.abc import Callable

from recipes.tiny.data.conversation import Conversation
from recipes.tiny.data.words import number_of, of_split, single_question


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
    steps: list[str] = []
    rest = 0
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
        a, b = number_of(rng, 5), number_of(rng, 5)
        if op == "-" and b > a and rng.random() < 0.9:
            a, b = b, a
        return a, b
    if op == "x":
        return (number_of(rng, 4), rng.randint(0, 9)) if rng.random() < 0.5 else (number_of(rng, 3), number_of(rng, 2))
    b = rng.randint(1, 12)
    return b * number_of(rng, 3), b


def arithmetic(rng: random.Random, split: str, length: int) -> Conversation:
    if rng.random() < 0.75:
        op = rng.choice("++--xx/")
        a, b = of_split(rng, split, 10, lambda: _operands(rng, op))
        text, work, value = f"{a} {rng.choice(SPELLED[op])} {b}", WORK[op](a, b), VALUE[op](a, b)
        final = f"{a} {op} {b} = {value}"
    else:  # a chain of + and -, or with one product
        numbers = of_split(rng, split, 10, lambda: tuple(number_of(rng, 3) for _ in range(rng.randint(3, 4))))
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
    return single_question("arithmetic", rng, question, work + ".", final, value)
