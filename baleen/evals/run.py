"""One evaluation from the command line: problems, questions, report."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from baleen.config import ConfigError
from baleen.evals import needle, problems, report
from baleen.evals.client import Server, Unreachable
from baleen.evals.problems import Problem
from baleen.evals.scoring import Answer

TASKS = (*problems.BUNDLED, "needle")
ANSWER_ROOM = 400  # tokens of a context that a needle question leaves to the template and the answer


def main(
    task: str,
    *,
    url: str,
    api_key: str | None,
    data_path: Path | None,
    num_shots: int,
    num_questions: int | None,
    parallel: int,
    repeat: int,
    thinking: bool | None,
    options: dict[str, Any],
    out: Path | None,
    plot: Path | None,
) -> int:
    """Ask and report; returns the exit code: 1 if there is no server or no question was answered. Raises ConfigError.

    num_questions  in all; None: every bundled problem, or two of each kind of needle
    repeat         every question is asked so many times, and counts as often
    options        fields of the requests
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plot", "matplotlib is not installed", "pip install 'baleen-llm[plots]'")
    asked = [] if task == "needle" else _fixed(task, data_path, num_shots, num_questions)
    server = Server(url, api_key, options, thinking)
    try:
        served, longest = server.model()
    except Unreachable as error:
        print(f"baleen: error: {error}; start one with `baleen serve`, or name its address with --url", file=sys.stderr)
        return 1
    options.setdefault("model", served)
    if task == "needle":
        asked = _needles(server, longest, num_questions)
    asked = asked * repeat
    # into a file, a look now and then: long texts take minutes
    bar = tqdm(total=len(asked), desc=task, unit=" questions", mininterval=0.1 if sys.stderr.isatty() else 30)

    def done(_index: int, _answer: Answer) -> None:
        bar.update()

    started = time.perf_counter()
    answers = asyncio.run(server.ask(asked, parallel, done))
    seconds = time.perf_counter() - started
    bar.close()
    print(report.table(task, asked, answers, seconds))
    settings = {
        "task": task,
        "url": server.url,
        "num_shots": num_shots,
        "parallel": parallel,
        "repeat": repeat,
        **options,
    }
    if out is not None:
        report.write_json(out, settings, asked, answers, seconds)
    if plot is not None:
        report.plot_needle(plot, f"Needle in a text: {options['model']}", asked, answers)
    return 0 if any(not answer.error for answer in answers) else 1


def _fixed(task: str, data_path: Path | None, num_shots: int, num_questions: int | None) -> list[Problem]:
    found = problems.gsm8k(data_path, num_shots) if task == "gsm8k" else problems.bundled(task)
    if num_questions is not None and num_questions < len(found):
        found = random.Random(0).sample(found, num_questions)
    return found


def _needles(server: Server, longest: int, num_questions: int | None) -> list[Problem]:
    """Of the lengths that the server takes."""
    ratio = server.characters_per_token(needle.sample_text(20_000))
    lengths = [length for length in needle.LENGTHS if length <= longest - ANSWER_ROOM]
    cells = len(lengths) * len(needle.KINDS) * len(needle.DEPTHS)
    per_cell = 2 if num_questions is None else max(1, round(num_questions / max(cells, 1)))
    return needle.generate(lengths, per_cell, ratio)
