"""Writes the held-out problems that `baleen eval` asks: the test split, from a fixed seed.

python -m recipes.tiny.problems
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

import baleen.evals
from baleen.evals.problems import Problem
from recipes.tiny.data import TASKS

FOLDER = Path(baleen.evals.__file__).parent / "problems"
COUNT = 200
NAMES = {"word": "gsm8k", "arithmetic": "arithmetic", "tools": "tools", "json": "json", "copy": "copy"}


def problems(task: str) -> list[Problem]:
    """`COUNT` different ones."""
    rng = random.Random(f"problems {task}")
    found: dict[str, Problem] = {}
    while len(found) < COUNT:
        talk = TASKS[task](rng, "test", 400)
        messages = talk.messages[: talk.asked]
        problem = Problem(
            task=NAMES[task],
            messages=messages,
            answer=talk.answer,
            thinking=talk.thinking,
            tools=talk.tools,
            schema=talk.schema,
        )
        found.setdefault(messages[-1]["content"], problem)
    return list(found.values())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for task, name in NAMES.items():
        (FOLDER / f"{name}.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(problems(task)))


if __name__ == "__main__":
    main()
