"""A pytest plugin: every N-th of the tests chosen, and a line of JSON for each as it starts and as it ends.

pytest -p gpu.shard --shard 1/3 --lines FILE ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SLOW = "deep_gemm"  # compiled by nvcc, seconds a kernel: last, so that what is cut has shown the rest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="the tests I, I + N, I + 2 N, ...")
    parser.addoption("--lines", type=Path, metavar="FILE", help="append to this as tests start and end")


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--shard").split("/"))
    items[:] = sorted(items[index::count], key=lambda item: SLOW in item.name)
    _write(config, {"tests": len(items)})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _write(item.config, {"started": item.nodeid})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if call.when == "call" or report.outcome != "passed":
        line = {"name": item.nodeid, "outcome": report.outcome, "seconds": round(call.duration, 2)}
        line.update(dict(item.user_properties))
        if report.failed:
            line["error"] = str(call.excinfo.value)[-1500:] if call.excinfo else str(report.longrepr)[-1500:]
        _write(item.config, line)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        print(str(report.longrepr)[-1500:], flush=True)


def _write(config: pytest.Config, line: dict[str, Any]) -> None:
    path = config.getoption("--lines")
    if path:
        with path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
