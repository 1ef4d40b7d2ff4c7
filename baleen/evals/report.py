"""Counts, the printed table, the JSON file, and the picture of needle accuracy over depth and length."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baleen.evals.needle import DEPTHS, KINDS, LENGTHS
from baleen.evals.problems import Problem
from baleen.evals.scoring import RULES, Answer, wilson

Counts = dict[tuple[str, ...], tuple[int, int]]


def counts(problems: Sequence[Problem], answers: Sequence[Answer], labels: Sequence[str]) -> Counts:
    """(right, asked) by the values of `labels`; () groups everything."""
    found: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for problem, answer in zip(problems, answers, strict=True):
        cell = found[tuple(problem.labels.get(label, "") for label in labels)]
        cell[0] += RULES[problem.task](answer, problem.answer) if not answer.error else False
        cell[1] += 1
    return {key: (right, asked) for key, (right, asked) in found.items()}


def line(name: str, right: int, asked: int) -> str:
    """`name   97.5 %  [94.1, 99.0]  195 of 200`."""
    low, high = wilson(right, asked)
    share = 100 * right / asked if asked else 0.0
    return f"{name:<24} {share:5.1f} %  [{100 * low:5.1f}, {100 * high:5.1f}]  {right} of {asked}"


def table(task: str, problems: Sequence[Problem], answers: Sequence[Answer], seconds: float) -> str:
    """What is printed: accuracy with its 95 % interval, by length for needle, speed, errors."""
    lines = [line(task, *counts(problems, answers, ()).get((), (0, 0)))]
    if task == "needle":
        by_cell = counts(problems, answers, ("kind", "length"))
        lines += [line(f"  {kind}, {length} tokens", *cell) for (kind, length), cell in by_cell.items()]
    generated = sum(answer.completion_tokens for answer in answers)
    read = sum(answer.prompt_tokens for answer in answers)
    lines.append(
        f"{seconds:.1f} s, {generated / seconds:.1f} output tokens/s, {(read + generated) / seconds:.1f} tokens/s"
    )
    failed = [answer.error for answer in answers if answer.error]
    cut = sum(answer.finish_reason == "length" for answer in answers)
    if failed:
        lines.append(f"{len(failed)} requests failed and count as wrong; the first: {failed[0]}")
    if cut:
        lines.append(f"{cut} answers were cut by max_tokens")
    return "\n".join(lines)


def write_json(
    path: Path, settings: dict[str, Any], problems: Sequence[Problem], answers: Sequence[Answer], seconds: float
) -> None:
    """Settings, totals, and each question's outcome with the text of the wrong ones."""
    right, asked = counts(problems, answers, ()).get((), (0, 0))
    cells = counts(problems, answers, ("kind", "length", "depth"))
    rows = []
    for problem, answer in zip(problems, answers, strict=True):
        correct = not answer.error and RULES[problem.task](answer, problem.answer)
        row: dict[str, Any] = {**problem.labels, "correct": correct, "completion_tokens": answer.completion_tokens}
        if not correct:
            calls = [{"name": name, "arguments": arguments} for name, arguments in answer.tool_calls]
            row |= {"expected": problem.answer, "content": answer.content, "tool_calls": calls, "error": answer.error}
        rows.append(row)
    data = {
        **settings,
        "accuracy": right / asked if asked else 0.0,
        "interval_95": wilson(right, asked),
        "right": right,
        "asked": asked,
        "seconds": seconds,
        "output_tokens_per_second": sum(answer.completion_tokens for answer in answers) / seconds,
        "cells": [
            {"kind": kind, "length": length, "depth": depth, "right": cell[0], "asked": cell[1]}
            for (kind, length, depth), cell in cells.items()
            if length
        ],
        "answers": rows,
    }
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def plot_needle(path: Path, title: str, problems: Sequence[Problem], answers: Sequence[Answer]) -> None:
    """Accuracy over depth and length, one panel a kind. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = counts(problems, answers, ("kind", "length", "depth"))
    lengths = [length for length in LENGTHS if any(key[1] == str(length) for key in cells)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(KINDS), squeeze=False)[0]
    image = None
    for panel, kind in zip(panels, KINDS, strict=True):
        shares = []
        for depth in DEPTHS:
            found = [cells.get((kind, str(length), str(depth)), (0, 0)) for length in lengths]
            shares.append([100 * right / asked if asked else float("nan") for right, asked in found])
        image = panel.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        panel.set_yticks(range(len(DEPTHS)), [f"{depth} %" for depth in DEPTHS])
        panel.set_xlabel("prompt, tokens")
        panel.set_ylabel("depth")
        panel.set_title(kind)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                panel.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="right, %")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
