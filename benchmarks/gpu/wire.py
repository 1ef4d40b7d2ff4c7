"""Stands in for the package zmq: the engine process's socket as two queues in this process.

The engine needs no other, and a machine lent for measurements need not have pyzmq. The messages are the same bytes.
"""

from __future__ import annotations

import queue
import sys
import threading
import types
from collections import deque
from typing import Any

API = b"api"  # the one API process


class Again(Exception):
    """Nothing to receive."""


class Router:
    """What `EngineProcess` calls of a zmq socket, and the other side: `deliver` to the engine, `outbox` from it."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._arrived = threading.Condition()
        self.outbox: queue.Queue[bytes] = queue.Queue()

    def deliver(self, message: bytes) -> None:
        with self._arrived:
            self._waiting.append(message)
            self._arrived.notify()

    def poll(self, milliseconds: int) -> bool:
        with self._arrived:
            return self._arrived.wait_for(lambda: bool(self._waiting), milliseconds / 1000)

    def recv_multipart(self, _flags: int) -> list[bytes]:
        with self._arrived:
            if not self._waiting:
                raise Again
            return [API, self._waiting.popleft()]

    def send_multipart(self, parts: list[bytes]) -> None:
        self.outbox.put(parts[1])

    def set(self, *_: Any) -> None:
        """Options mean nothing here."""

    def bind(self, _address: str) -> None:
        """There is nothing to bind."""

    def close(self) -> None:
        """There is nothing to close."""


def stand_in() -> list[Router]:
    """From now on `import zmq` finds this. Returns the list that each new socket is put into."""
    made: list[Router] = []

    def socket(_kind: int) -> Router:
        made.append(Router())
        return made[-1]

    module: Any = types.ModuleType("zmq")
    module.Again = Again
    for name in ("ROUTER", "SNDHWM", "RCVHWM", "LINGER", "ROUTER_HANDOVER", "NOBLOCK"):
        setattr(module, name, 0)
    module.Context = lambda: types.SimpleNamespace(socket=socket)
    sys.modules["zmq"] = module
    return made
