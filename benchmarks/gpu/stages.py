"""One process for each part of a measurement, so that one that fails, hangs or spoils the GPU hides no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SHOWN = 500  # characters of a line in the log
CONFIGS = ROOT / "benchmarks" / "configs"
GRACE = 4.0  # seconds from SIGTERM to SIGKILL: tables are printed then

_running: set[subprocess.Popen[bytes]] = set()
_ending = threading.Event()


class Cut(BaseException):
    """SIGTERM has come."""


def end_on_sigterm() -> None:
    """From now on SIGTERM ends every part that runs, no other starts, and the script goes on to its end."""

    def end(*_: Any) -> None:
        _ending.set()
        for stage in list(_running):
            stage.terminate()

    signal.signal(signal.SIGTERM, end)


def _cut(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Cut


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
    """Run a part in this process; the exit code. SIGTERM cuts it: its `finally` prints what there is."""
    signal.signal(signal.SIGTERM, _cut)
    report = Report(out / f"{name}.json")
    try:
        part(device, report)
    except Cut:
        report.failed += 1
        report.add("part", error="cut")
        print(f"{report.passed} passed, {report.failed} failed", flush=True)
        os._exit(124)  # an engine's thread may never end
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
        if _ending.is_set():
            log.write("not started\n")
            return 124
        stage = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT, start_new_session=True
        )
        _running.add(stage)
        limit = started + seconds
        while stage.poll() is None and time.monotonic() < limit and not _ending.is_set():
            time.sleep(0.1)
        code = stage.poll()
        if code is None:
            stage.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                stage.wait(GRACE)
            code = 124
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)  # the processes it started: they hold the GPU
        stage.wait()
        _running.discard(stage)
        log.write(f"exit {code}, {time.monotonic() - started:.0f} s\n")
    return code


@dataclass
class Child:
    """A process of a part: its output goes to a file, and it has `limit` seconds."""

    name: str
    command: list[str]
    output: Path
    environ: dict[str, str]
    limit: float


def run_all(
    children: list[Child], at_once: int, seconds: float
) -> Generator[tuple[str, int | None, float], None, None]:
    """Name, exit code and seconds of each as it ends, so many at once, in order; those still there after `seconds` are
    killed, code 124, and what was not started then has the code None. A part that is cut kills them too.
    """
    until = time.monotonic() + seconds
    waiting = list(children)
    running: list[tuple[Child, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < at_once and now < until:
                child = waiting.pop(0)
                with child.output.open("w") as output:
                    process = subprocess.Popen(
                        child.command, stdout=output, stderr=subprocess.STDOUT, env=child.environ, cwd=ROOT
                    )
                running.append((child, process, now))
            for one in list(running):
                child, process, began = one
                code = process.poll()
                if code is None and now > min(until, began + child.limit):
                    process.kill()
                    process.wait()
                    code = 124
                if code is not None:
                    running.remove(one)
                    yield child.name, code, now - began
            if now >= until:
                for child in waiting:
                    yield child.name, None, 0.0
                waiting = []
            time.sleep(0.05)
    finally:
        for _, process, _ in running:
            process.kill()


def each(
    children: list[Child], at_once: int, seconds: float, collect: Callable[[str, int | None, float], None]
) -> None:
    """`collect` for each of them as it ends; when the part is cut, for those that had not ended too."""
    left = {child.name for child in children}
    ended = run_all(children, at_once, seconds)
    try:
        for name, code, took in ended:
            left.discard(name)
            collect(name, code, took)
    except Cut:
        ended.close()
        for child in children:
            if child.name in left:
                collect(child.name, 124 if child.output.exists() else None, 0.0)
        raise


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
