"""Several API processes before one engine: each answers its own clients, all tell the same totals, none is left alone
by the end of another.

A process that is stopped (SIGSTOP) accepts no connection: that is how a test chooses who answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baleen.model.random_checkpoint import build_random_checkpoint
from tests.serving import Server, command_line, serve

MODEL = "baleen-test"
FLAGS = ("--served-model-name", MODEL, "--context-length", "2048", "--max-total-tokens", "16384")
FLAGS = (*FLAGS, "--tokenizer-worker-num", "2", "--max-running-requests", "3", "--max-queued-requests", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", size="tiny")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serve(checkpoint, *FLAGS) as running:
        wait_until(lambda: len(children(running)) == 2)
        answers(running, children(running)[1])
        yield running


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def children(server: Server) -> list[int]:
    """The engine, then API process 1."""
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if b"spawn_main" in command_line(pid)]


def other(server: Server) -> int:
    return children(server)[1]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def answers(server: Server, pid: int) -> None:
    """Wait until the API process serves, without another's help."""
    api = {server.process.pid, other(server)}
    (rest,) = api - {pid}

    def healthy() -> bool:
        with stopped(rest):
            try:
                return httpx.get(f"{server.url}/health", timeout=0.5).status_code == 200
            except httpx.TransportError:
                return False

    wait_until(healthy)


class Stream(threading.Thread):
    """A long completion, opened at the API process that is not stopped, read until it ends however it does."""

    def __init__(self, server: Server, rid: str | None = None, num_tokens: int = 1500, waits: bool = False) -> None:
        super().__init__(daemon=True)
        self.url = f"{server.url}/v1/completions"
        self.body = {"model": MODEL, "prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        if rid is not None:
            self.body["rid"] = rid
        self.lines: list[str] = []
        self.broken = False
        self.start()
        if waits:
            server.wait_for_metric("sglang:num_queue_reqs", 1)
        else:
            wait_until(lambda: self.lines or not self.is_alive())

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=60) as response:
                self.lines += [f"{response.status_code}"]
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)
        except httpx.TransportError:
            self.broken = True

    def last_choice(self) -> dict[str, Any]:
        assert self.lines[-1] == "data: [DONE]"
        choice: dict[str, Any] = json.loads(self.lines[-2].removeprefix("data: "))["choices"][0]
        return choice


def at_each(server: Server, **fields: Any) -> tuple[Stream, Stream]:
    """A stream at process 0 and one at process 1."""
    with stopped(other(server)):
        first = Stream(server, **fields)
    with stopped(server.process.pid):
        second = Stream(server, **fields)
    return first, second


def abort_all(server: Server) -> None:
    assert httpx.post(f"{server.url}/abort_request", json={"abort_all": True}).status_code == 200
    server.wait_for_metric("sglang:num_running_reqs", 0)


def totals(server: Server) -> dict[str, float]:
    """Counters of the API processes, without those of HTTP."""
    lines = httpx.get(f"{server.url}/metrics", timeout=5).text.splitlines()
    named = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    wanted = ("_tokens_total{", "_count{", "_sum{", "_bucket{", "num_requests_total{", "aborted_requests_total{")
    return {name: float(value) for name, _, value in named if any(part in name for part in wanted)}


def test_totals_are_of_all_processes(server: Server) -> None:
    before = totals(server)
    for pid in (server.process.pid, other(server)):
        with stopped(pid):
            body = {"model": MODEL, "prompt": "abc", "max_tokens": 5, "ignore_eos": True}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).status_code == 200
    seen = []
    for pid in (server.process.pid, other(server)):
        time.sleep(1.2)  # the engine has reported to both
        with stopped(pid):
            seen.append(totals(server))
    assert seen[0] == seen[1]
    label = f'{{engine_type="unified",model_name="{MODEL}"}}'
    for name, count in (("num_requests_total", 2), ("generation_tokens_total", 10), ("prompt_tokens_total", 6)):
        key = f"sglang:{name}{label}"
        assert seen[0][key] - before[key] == count
    key = f"sglang:time_to_first_token_seconds_count{label}"
    assert seen[0][key] - before[key] == 2


def test_abort_reaches_requests_of_the_other_process(server: Server) -> None:
    with stopped(server.process.pid):
        named, nameless = Stream(server, rid="job-7"), Stream(server)
    with stopped(other(server)):
        near = Stream(server, rid="jo")
        again = httpx.post(f"{server.url}/v1/completions", json=named.body, timeout=20)
        assert again.status_code == 400
        assert again.json()["error"]["message"].startswith("rid: 'job-7'")
        assert httpx.post(f"{server.url}/abort_request", json={"rid": "job"}).status_code == 200
    named.join(10)
    assert named.last_choice()["finish_reason"] == "abort"
    assert near.is_alive()
    assert nameless.is_alive()
    abort_all(server)
    for stream in (near, nameless):
        stream.join(10)
        assert stream.last_choice()["finish_reason"] == "abort"


def test_the_queue_limit_counts_all_processes(server: Server) -> None:
    """Three run, one waits: the fifth is too many, wherever it comes."""
    streams = [*at_each(server), Stream(server)]
    with stopped(server.process.pid):
        streams.append(Stream(server, waits=True))
    for pid in (server.process.pid, other(server)):
        with stopped(pid):
            full = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=20)
            assert full.status_code == 503
            assert full.json()["error"]["code"] == "queue_full"
            assert full.headers["retry-after"] == "1"
    abort_all(server)
    for stream in streams:
        stream.join(10)


def test_a_crashed_process_is_started_anew(server: Server) -> None:
    """Its clients lose their connection and its request its pages; the other's stream goes on."""
    first, second = at_each(server)
    server.wait_for_metric("sglang:num_running_reqs", 2)
    before = other(server)
    os.kill(before, signal.SIGKILL)
    second.join(10)
    assert second.broken
    wait_until(lambda: children(server)[1:] not in ([], [before]))
    server.wait_for_metric("sglang:num_running_reqs", 1)
    answers(server, other(server))
    assert first.is_alive()
    abort_all(server)
    first.join(10)
    assert first.last_choice()["finish_reason"] == "abort"
    streams = [*at_each(server), Stream(server), Stream(server, waits=True)]  # the old process has nothing open
    abort_all(server)
    for stream in streams:
        stream.join(10)
        assert stream.lines[0] == "200"


def test_sigterm_drains_all(checkpoint: Path) -> None:
    with serve(checkpoint, *FLAGS) as server:
        wait_until(lambda: len(children(server)) == 2)
        answers(server, other(server))
        answers(server, server.process.pid)
        streams = at_each(server, num_tokens=150)
        pids = children(server)
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join(60)
            assert stream.last_choice()["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_dead_engine_ends_all(checkpoint: Path, tmp_path: Path) -> None:
    with serve(checkpoint, *FLAGS, log=tmp_path / "log") as server:
        wait_until(lambda: len(children(server)) == 2)
        answers(server, other(server))
        answers(server, server.process.pid)
        streams = at_each(server)
        engine, sibling = children(server)
        os.kill(engine, signal.SIGKILL)
        for stream in streams:
            stream.join(5)
            assert stream.lines[-1] == "data: [DONE]"
            assert "SIGKILL" in json.loads(stream.lines[-2].removeprefix("data: "))["error"]["message"]
        assert server.process.wait(10) == 1
        assert not Path(f"/proc/{sibling}").exists()


def test_a_process_that_cannot_live_ends_the_server(checkpoint: Path, tmp_path: Path) -> None:
    with serve(checkpoint, *FLAGS, log=tmp_path / "log") as server:
        wait_until(lambda: len(children(server)) == 2)
        for _ in range(3):
            before = other(server)
            os.kill(before, signal.SIGKILL)
            wait_until(lambda old=before: server.process.poll() is not None or children(server)[1:] not in ([], [old]))
        assert server.process.wait(20) == 1
    assert (tmp_path / "log").read_text().count("API process 1 ended (signal SIGKILL)") == 3
