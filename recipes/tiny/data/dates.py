"""Dates, times and units."""

# ruff: noqa: E501
from __future__ import annotations

import random
from datetime import date, timedelta

from recipes.tiny.data.arithmetic import multiply, subtract
from recipes.tiny.data.conversation import Conversation
from recipes.tiny.data.words import DAYS, MONTHS, of_split, single_question

UNITS = (
    ("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("hours", "minutes", 60), ("minutes", "seconds", 60),
    ("days", "hours", 24), ("weeks", "days", 7), ("cm", "mm", 10), ("litres", "ml", 1000), ("years", "months", 12),
    ("tons", "kg", 1000), ("dollars", "cents", 100),
)  # fmt: skip


def dates(rng: random.Random, split: str, length: int) -> Conversation:
    kind = rng.randrange(5)
    if kind == 0:
        day, n = of_split(rng, split, 10, lambda: (rng.randrange(7), rng.randint(1, 99)))
        back = rng.random() < 0.3
        target = DAYS[(day - n if back else day + n) % 7]
        question = rng.choice((
            "Today is {d}. Which day of the week {v} it {n} days {w}?", "It is {d} today. What day {v} it {n} days {w}?",
        )).format(d=DAYS[day], n=n, v="was" if back else "will", w="ago" if back else "from now")  # fmt: skip
        question = question.replace(" it ", " it be ") if not back else question
        rest = n % 7
        walk = [DAYS[(day - i if back else day + i) % 7] for i in range(rest + 1)]
        work = f"{n} = 7 x {n // 7} + {rest}. So I count {rest} days {'back' if back else 'on'}: {', '.join(walk)}."
        return single_question("dates", rng, question, work, f"It {'was' if back else 'will be'} {target}.", target)
    if kind == 1:
        start, n = of_split(
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
            rest = last.day - at.day
            steps.append(
                f"{month} {at.year} has {last.day} days: {last.day} - {at.day} = {rest}, {rest} + 1 = {rest + 1}"
            )
            steps.append(f"So {rest + 1} days lead to the first of the next month")
            steps.append(f"{left} - {rest + 1} = {left - rest - 1} days are left")
            left -= rest + 1
            at = last + timedelta(days=1)
        final = f"{MONTHS[end.month - 1]} {end.day}, {end.year}"
        return single_question("dates", rng, question, ". ".join(steps) + ".", f"It is {final}.", final)
    if kind == 2:
        (big, small, factor), n = of_split(rng, split, 10, lambda: (rng.choice(UNITS), rng.randint(1, 99)))
        if rng.random() < 0.5:
            question = rng.choice(("How many {s} are {n} {b}?", "Convert {n} {b} to {s}.", "{n} {b} in {s}?"))
            value, work = n * factor, f"One of the {big} is {factor} {small}. {multiply(n, factor)}."
            question = question.format(s=small, b=big, n=n)
        else:
            question = rng.choice(("How many {b} are {n} {s}?", "Convert {n} {s} to {b}.", "{n} {s} in {b}?"))
            question = question.format(s=small, b=big, n=n * factor)
            tens, ones = n // 10 * 10, n % 10
            value, work = n, f"{factor} {small} are one of the {big}. "
            if factor in (10, 100, 1000) or not tens or not ones:
                work += f"{n * factor} / {factor} = {n}."
            else:
                work += f"{factor} x {tens} = {factor * tens}, {subtract(n * factor, factor * tens)}, "
                work += f"{factor * ones} / {factor} = {ones}, {tens} + {ones} = {n}."
            small = big
        return single_question("dates", rng, question, work, f"It is {value} {small}.", value)
    if kind == 3:
        hour, minute, plus = of_split(
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
        return single_question("dates", rng, question, work, f"It is {final}.", final)
    month, year = of_split(rng, split, 10, lambda: (rng.randrange(12), rng.randint(1900, 2099)))
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = [31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month]
    work = f"{year} is {'' if leap else 'not '}a leap year. {MONTHS[month]} has {days} days."
    question = rng.choice(("How many days does {m} {y} have?", "How many days are there in {m} {y}?"))
    return single_question("dates", rng, question.format(m=MONTHS[month], y=year), work, f"It has {days} days.", days)
