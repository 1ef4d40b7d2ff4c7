"""What the benchmarks of the ops share: correctness first, one way to time, one table and its JSON.

Ceilings: large copies and large FP8 GEMMs (DeepGEMM) on one H200. Floors are bytes or operations over them.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from baleen.kernels.testing import Case, check

T = TypeVar("T")

BYTES_PER_MS = 4.26e9
FP8_FLOPS_PER_MS = 1.232e12


@dataclass
class Result:
    """One line of the table. floor_ms: the larger of the time for the bytes and for the operations."""

    shape: str
    floor_ms: float
    ms: dict[str, float | str] = field(default_factory=dict)


def median_ms(function: Callable[[], Any], budget_ms: float = 200) -> float:
    """GPU time of one call, the caches cold: the median of at least 10. Launches hide behind the flush."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    times: list[float] = []
    while len(times) < 10 or (sum(times) < budget_ms and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def captured(function: Callable[[], T]) -> tuple[Callable[[], Any], T]:
    """Its calls as the replay of a CUDA graph, as in a server, and what they write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


def time_all(result: Result, functions: Mapping[str, Callable[[], Any]]) -> Result:
    """Adds the time of each; one that fails adds its error, and the others go on."""
    for name, function in functions.items():
        try:
            result.ms[name] = median_ms(function)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            result.ms[name] = f"{type(error).__name__}: {error}"[:200]
        print(f"{result.shape}: {name} {result.ms[name]}", flush=True)
    return result


def correct(implementations: Mapping[str, str], cases: Sequence[Case], names: Sequence[str]) -> dict[str, str]:
    """Those implementations on the GPU against the reference on the CPU: name -> "n cases" or what failed first."""
    verdicts = {}
    for name in names:
        failures = []
        for case in cases:
            try:
                check(implementations, name, case, device="cuda")
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{case}: {error}")
        verdicts[name] = f"{len(failures)} of {len(cases)}: {failures[0]}"[:600] if failures else f"{len(cases)} cases"
        print(f"correct: {name} {verdicts[name]}", flush=True)
    return verdicts


def report(title: str, results: Sequence[Result], verdicts: Mapping[str, str]) -> None:
    """Writes <argv 1>/<title>.json and .md."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }
    content = {"machine": machine, "correct": dict(verdicts), "results": [asdict(result) for result in results]}
    (folder / f"{title}.json").write_text(json.dumps(content, indent=1))
    names = list(dict.fromkeys(name for result in results for name in result.ms))
    lines = [
        f"{title}, ms (times the floor): {machine}",
        *(f"- {name}: {verdict}" for name, verdict in verdicts.items()),
    ]
    lines += ["", f"| shape | floor | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for result in results:
        cells = [_cell(result.ms.get(name), result.floor_ms) for name in names]
        lines.append(f"| {result.shape} | {result.floor_ms:.4f} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    (folder / f"{title}.md").write_text(text + "\n")
    print(text)


def _cell(ms: float | str | None, floor_ms: float) -> str:
    if isinstance(ms, float):
        return f"{ms:.4f} ({ms / floor_ms:.1f})"
    return "-" if ms is None else "failed"
