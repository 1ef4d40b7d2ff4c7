"""Processes and sockets: what ends what, who hears Ctrl-C, which flag is to blame."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from baleen import launch
from baleen.config import ConfigError


def child(file: str) -> None:
    launch._end_with_parent()
    ignored = all(signal.getsignal(name) is signal.SIG_IGN for name in (signal.SIGINT, signal.SIGTERM))
    Path(file + ".part").write_text(f"{os.getpid()} {ignored}")
    Path(file + ".part").rename(file)
    time.sleep(100)


def parent(file: str) -> None:
    launch._start(child, file)
    time.sleep(100)


def test_a_child_ends_with_its_parent_and_leaves_ctrl_c_to_it(tmp_path: Path) -> None:
    file = tmp_path / "child"
    before = signal.getsignal(signal.SIGINT)
    process = launch._start(parent, str(file))
    assert signal.getsignal(signal.SIGINT) is before
    try:
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
    pid, ignored = file.read_text().split()
    assert ignored == "True"
    deadline = time.monotonic() + 5
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # reaped
        while Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline, "the child outlives its parent"
            time.sleep(0.02)


def test_the_flag_to_blame() -> None:
    blames_port = pytest.raises(ConfigError, match=r"^--port: cannot listen on 127\.0\.0\.1:")
    with socket.create_server(("127.0.0.1", 0)) as taken, blames_port:
        launch._listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match=r"^--host: cannot listen on 192\.0\.2\.1:"):
        launch._listen("192.0.2.1", 0)


def test_a_slow_client_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """While requests run nothing is cut; after that, what is still connected has a moment and is cut."""
    monkeypatch.setattr(launch, "SLOW_CLIENT_SECONDS", 0.1)
    client: Any = SimpleNamespace(num_open=1)
    connection = Mock()
    server: Any = SimpleNamespace(server_state=SimpleNamespace(connections={connection}))

    async def run() -> None:
        leaving = asyncio.create_task(launch._leave_slow_clients(client, server))
        await asyncio.sleep(0.4)
        connection.transport.abort.assert_not_called()
        client.num_open = 0
        await asyncio.wait_for(leaving, 5)
        connection.transport.abort.assert_called_once()

    asyncio.run(run())
