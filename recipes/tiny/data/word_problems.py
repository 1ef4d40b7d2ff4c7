"""Grade-school word problems: stories of a stock of things, and fixed problem kinds with several frames."""

# ruff: noqa: E501
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from recipes.tiny.data.arithmetic import VALUE, WORK, add, divide, multiply, subtract
from recipes.tiny.data.conversation import Conversation
from recipes.tiny.data.words import COLOURS, ITEMS, NAMES, of_split, one_of, single_question

# A frame names its numbers; the maker draws them and gives the steps

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

    kinds, phrases = of_split(rng, split, 8, make)
    p, q = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)

    def numbers() -> tuple[int, ...]:
        top = rng.choice((20, 60, 200))
        return (rng.randint(2, top), *(rng.randint(2, top) for _ in kinds))

    while True:
        drawn = of_split(rng, split, 5, numbers)
        n = drawn[0]
        text = [START[phrases[0] % len(START)].format(p=p, i=item, n=n)]
        steps = [f"{p} starts with {n} {item}"]
        for kind, k, phrase in zip(kinds, drawn[1:], phrases[1:]):
            if kind == "g":
                text.append(GAIN[phrase % len(GAIN)].format(p=p, q=q, i=item, k=k))
                steps.append(f"{p} gets {k}: {add(n, k)}")
                n += k
            elif kind == "l":
                if k > n:
                    break
                text.append(LOSE[phrase % len(LOSE)].format(p=p, q=q, i=item, k=k))
                steps.append(f"{p} loses {k}: {subtract(n, k)}")
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

    kind, frame, item, other = of_split(rng, split, 8, make)
    frames, draw, plan = PROBLEMS[kind]
    numbers = of_split(rng, split, 5, lambda: draw(rng))
    p, q = rng.sample(NAMES, 2)
    words: dict[str, Any] = dict(zip("abcd", numbers))
    words |= {"p": p, "q": q, "i": item, "j": other, "i1": one_of(item), "j1": one_of(other), "o": rng.choice(COLOURS)}
    values: dict[str, int] = dict(zip("abcd", numbers))
    steps = []
    for number, (label, op, left, right) in enumerate(plan, 1):
        x, y = (int(t[1:]) if t[0] == "=" else values[t] for t in (left, right))
        steps.append(f"{label.format(**words)}: {WORK[op](x, y)}")
        values[str(number)] = VALUE[op](x, y)
    return frames[frame].format(**words), steps, values[str(len(plan))]


def word(rng: random.Random, split: str, length: int) -> Conversation:
    text, steps, value = _story(rng, split) if rng.random() < 0.5 else _fixed(rng, split)
    return single_question("word", rng, text, ". ".join(steps) + ".", f"The answer is {value}.", value)
