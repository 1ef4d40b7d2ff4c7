"""One process for each part of a measurement, so that one that fails, hangs or spoils the GPU hides no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SHOWN = 500  # characters of a line in the log
CONFIGS = ROOT / "benchmarks" / "configs"


class Report:
    """Lines of a part; written as they come, so that a crash leaves what was there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.passed = self.failed = 0

    def add(self, name: str, **values: Any) -> None:
        self.lines.append({"name": name, **values})
        shown = str({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in values.items()})
        print(name, shown if len(shown) <= SHOWN else f"{shown[:SHOWN]} ...", flush=True)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.lines, indent=1, default=str) + "\n")

    def attempt(self, name: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`check` returns figures; "ok": False in them, or an exception, is a failure."""
        try:
            values = check()
        except Exception as error:
            values = {"ok": False, "error": "".join(traceback.format_exception(error)[-3:])[-1500:]}
        self.passed += values.get("ok", True)
        self.failed += not values.get("ok", True)
        self.add(name, **values)
        return values


def run_here(name: str, part: Callable[[str, Report], None], device: str, out: Path) -> int:
    """Run a part in this process; the exit code."""
    report = Report(out / f"{name}.json")
    try:
        part(device, report)
    except Exception:
        report.failed += 1
        report.add("part", error=traceback.format_exc())
    report.write()
    print(f"{report.passed} passed, {report.failed} failed")
    return int(report.failed > 0)


def spawn(script: str, option: str, name: str, device: str, work: Path, seconds: float) -> int:
    """Run a part in a process of its own, its output in <work>/<name>.log; 124 if its time was up."""
    started = time.monotonic()
    command = [sys.executable, script, option, name, "--device", device, "--out", str(work)]
    with (work / f"{name}.log").open("w") as log:
        stage = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT, start_new_session=True
        )
        try:
            code = stage.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(stage.pid, signal.SIGKILL)  # with the processes it started: they hold the GPU
            code = 124
        log.write(f"exit {code}, {time.monotonic() - started:.0f} s\n")
    return code


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the repository on the import path."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(extra or {})}


def table(rows: list[list[Any]], header: list[str]) -> str:
    """Columns of text: numbers with three digits or so, None as a dash."""
    cells = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return "-" if value is None else str(value)
