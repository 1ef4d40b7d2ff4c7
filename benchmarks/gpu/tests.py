"""The tests marked gpu, in parallel processes: most of their time is compiling. Each has its own limit, and what
it has shown is reported when it ends, however it ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from gpu.stages import ROOT, Child, Report, each, environment, table

SECONDS = 90  # of a process
SHOWN = 3  # slowest tests of a process


class Unit(NamedTuple):
    """What a process runs: test folders, and every `shards`-th test of them from `shard` on."""

    name: str
    paths: tuple[str, ...]
    shard: int = 0
    shards: int = 1


def _shards(name: str, paths: tuple[str, ...], count: int) -> list[Unit]:
    return [Unit(f"{name} {i + 1}/{count}" if count > 1 else name, paths, i, count) for i in range(count)]


OPS = {  # ops of a process, in how many processes; the longest first
    ("fp8_gemm",): 3,
    ("fp8_experts",): 2,
    ("index_logits",): 2,
    ("sparse_mla",): 2,
    ("dense_mla",): 1,
    ("topk",): 2,
    ("lm_head",): 2,
    ("grouped_gemm", "rms_norm"): 1,
    ("mla_inputs", "moe_gate", "kv_store"): 1,
    ("fp8_quant", "hadamard", "rope"): 1,
}


# Their own tests run the cases on a GPU, against an outside oracle, and within the cases' tolerances.
OWN_CASES = {"fp8_gemm", "sparse_mla", "dense_mla", "topk", "mla_inputs", "moe_gate", "kv_store", "lm_head"}


def ops() -> list[Unit]:
    """Of each op its own tests and its cases in kernels/test_gpu.py; an op that has no place above goes last."""
    names = import_module("baleen.kernels.test_gpu").OPS
    listed = {op for group in OPS for op in group}
    groups = {**OPS, **{(op,): 1 for op in names if op not in listed}}
    units = []
    for group, count in groups.items():
        paths = []
        for op in group:
            paths.append(f"baleen/kernels/{op}")
            paths += (
                []
                if op in OWN_CASES
                else [
                    f"baleen/kernels/test_gpu.py::test_implementation[{op}-{name}]"
                    for name in import_module(f"baleen.kernels.{op}").IMPLEMENTATIONS
                ]
            )
        units += _shards("+".join(group), tuple(paths), count)
    return units


def folder(path: str, count: int) -> Callable[[], list[Unit]]:
    return lambda: _shards(Path(path).name, (path,), count)


def stage(units: Callable[[], list[Unit]], at_once: int, seconds: float) -> Callable[[str, Report], None]:
    """A stage that runs them, so many at once; what has not ended after `seconds` is ended."""

    def run(device: str, report: Report) -> None:
        parts = {unit.name: unit for unit in units()}
        children = [Child(name, *_command(unit, report), SECONDS) for name, unit in parts.items()]
        rows: list[list[Any]] = []
        try:
            each(children, at_once, seconds, lambda *ended: rows.append(_collect(report, *ended)))
        finally:
            print(table(rows, ["process", "exit", "s", "tests", "passed", "failed", "skipped", "not run"]))

    return run


def _files(report: Report, name: str) -> tuple[Path, Path]:
    stem = f"{report.path.stem}_{name.replace(' ', '_').replace('/', 'of')}"
    return report.path.with_name(f"{stem}.jsonl"), report.path.with_name(f"{stem}.output")


def _command(unit: Unit, report: Report) -> tuple[list[str], Path, dict[str, str]]:
    lines, output = _files(report, unit.name)
    lines.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "gpu.shard", "-m", "gpu", *unit.paths]
    command += ["--shard", f"{unit.shard}/{unit.shards}", "--lines", str(lines), "-q", "--tb=line", "-p", "no:warnings"]
    command += ["--continue-on-collection-errors", "-p", "no:xdist", "-rf"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of references: threads that wait for cores spin
    environ = environment(threads)
    environ["PYTHONPATH"] = f"{ROOT / 'benchmarks'}:{environ['PYTHONPATH']}"
    return command, output, environ


def _collect(report: Report, name: str, code: int | None, took: float) -> list[Any]:
    """What a process has written becomes a line of the report; and one for each failure. code: None if not started."""
    path, output = _files(report, name)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tests = next((line["tests"] for line in lines if "tests" in line), None)
    ended = {line["name"]: line for line in lines if "outcome" in line}
    of = {kind: [one for one in ended.values() if one["outcome"] == kind] for kind in ("passed", "failed", "skipped")}
    running = [line["started"] for line in lines if "started" in line and line["started"] not in ended]
    for one in of["failed"]:
        report.attempt(_short(one.pop("name")), lambda: {"ok": False, **one})  # noqa: B023
    slowest = sorted(ended, key=lambda one: -ended[one]["seconds"])[:SHOWN]
    whole = tests is not None and tests == len(ended)
    values: dict[str, Any] = {
        "exit": code, "seconds": took, "tests": tests, **{kind: len(some) for kind, some in of.items()},
        "slowest": [f"{_short(one)} {ended[one]['seconds']} s" for one in slowest],
        "errors": {
            _short(one["name"]): {key: one[key] for key in one.keys() - {"name", "outcome", "seconds"}}
            for one in of["passed"] if len(one) > 3
        },
    }  # fmt: skip
    if not whole or (code not in (0, 5) and not of["failed"]):  # 5: no test of these is for a GPU
        values["running"] = running
        values["output"] = output.read_text()[-1500:] if output.exists() else ""
        values["ok"] = False
    report.attempt(name, lambda: values)
    return [
        name,
        code,
        took,
        tests,
        *(len(some) for some in of.values()),
        None if tests is None else tests - len(ended),
    ]


def _short(name: str) -> str:
    return name.removeprefix("baleen/").split("/")[-1].removesuffix(".py")
