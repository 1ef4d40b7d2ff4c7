"""The questions of a task: a file of the package, a file of the user, or `needle.generate`.

The bundled files hold problems whose sentence frames, numbers, names and tools the bundled model never saw in training;
`python -m recipes.tiny.problems` writes them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from baleen.config import ConfigError

BUNDLED = ("gsm8k", "arithmetic", "tools", "json", "copy")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request and what its answer must be.

    task      a key of `scoring.RULES`
    answer    what the rule compares with: a number or text, a JSON value, a list of {"name", "arguments"}, or strings
              that must occur
    schema    asked for with `response_format`
    labels    what results are counted by, such as {"length": "8000", "depth": "50"}
    """

    task: str
    messages: list[dict[str, Any]]
    answer: Any
    thinking: bool = False
    tools: list[dict[str, Any]] = []
    schema: dict[str, Any] | None = None
    labels: dict[str, str] = {}


def bundled(task: str) -> list[Problem]:
    """All problems of a task that come with the package, in their fixed order."""
    data = resources.files("baleen.evals").joinpath("problems", f"{task}.jsonl").read_bytes()
    return msgspec.json.Decoder(Problem).decode_lines(data)


def gsm8k(path: Path | None, num_shots: int) -> list[Problem]:
    """Word problems: the bundled ones, or those of a GSM8K file (JSON lines with "question" and "answer"). The first
    `num_shots` stand answered before each of the others.

    Raises ConfigError.
    """
    if path is None:
        rows = [(str(p.messages[-1]["content"]), f"The answer is {p.answer}.", p) for p in bundled("gsm8k")]
    else:
        rows = [(question, answer, _gsm8k_row(question, answer)) for question, answer in _read_gsm8k(path)]
    if len(rows) <= num_shots:
        raise ConfigError("--num-shots", f"there are {len(rows)} problems in all", "ask for fewer")
    examples = [
        message
        for question, answer, _ in rows[:num_shots]
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    return [
        msgspec.structs.replace(problem, messages=[*examples, *problem.messages]) for *_, problem in rows[num_shots:]
    ]


def _read_gsm8k(path: Path) -> list[tuple[str, str]]:
    try:
        rows = msgspec.json.Decoder(dict[str, str]).decode_lines(path.read_bytes())
        return [(row["question"], row["answer"]) for row in rows]
    except (OSError, msgspec.DecodeError, KeyError) as error:
        fix = 'give the JSON lines of GSM8K, each with "question" and "answer"'
        raise ConfigError("--data-path", f"{path} cannot be read ({error})", fix) from error


def _gsm8k_row(question: str, answer: str) -> Problem:
    number = answer.rsplit("####", 1)[-1].strip().replace(",", "")
    return Problem(task="gsm8k", messages=[{"role": "user", "content": question}], answer=number)
