"""Starts the engine process beside this one, which serves HTTP, alone or with more API processes; watches and stops
them.

This process is API process 0. The others share its listening socket, end with it, and hear from it when to stop. One
that crashes is started anew; its connections are lost and its requests aborted. No API process imports torch: the
engine process does, in `_engine_main`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn
import uvloop

from baleen.chat.format import detect
from baleen.chat.tokenizer import Tokenizer
from baleen.config import Config, ConfigError
from baleen.server.app import create_app
from baleen.server.engine_client import EngineClient
from baleen.server.shared_counters import SharedCounters

DRAIN_SECONDS = 600  # how long SIGTERM waits for open requests
SLOW_CLIENT_SECONDS = 10.0  # how long SIGTERM waits for clients to send or to read the rest, when nothing runs any more
FAIL_SECONDS = 2.0  # how long open responses have to carry the error away once the engine is dead
STOP_SECONDS = 10.0  # how long the engine has to end after `Shutdown`
MOST_CRASHES = 3  # of one API process within CRASH_SECONDS: starting it anew does not help, the server ends
CRASH_SECONDS = 60.0


class _Server(uvicorn.Server):
    """uvicorn re-raises a signal once it has drained, which would end this process before the engine is stopped; here
    it does not.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: Config) -> int:
    """Serve until SIGTERM or Ctrl-C (drains, returns 0) or until the engine process dies (returns 1).

    Raises ConfigError.
    """
    tokenizer = Tokenizer.load(config)
    chat_format = detect(config)
    listener = _listen(config.server.host, config.server.port)
    print(f"baleen: {chat_format.reason}", flush=True)
    with tempfile.TemporaryDirectory(prefix="baleen-") as name:
        folder = Path(name)
        api = _ApiProcess(config, tokenizer, folder, 0)
        engine = _start(_engine_main, config, _address(folder))
        others = [_Sibling(config, listener, folder, i) for i in range(1, config.server.tokenizer_worker_num)]
        try:
            return uvloop.run(_serve(api, listener, engine, others))
        finally:
            for process in (engine, *(sibling.process for sibling in others)):
                process.kill()
                process.join()


def _address(folder: Path) -> str:
    return f"ipc://{folder}/engine"


def _start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a process that leaves Ctrl-C and SIGTERM, which may go to both, to this one from its first moment on."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    ignored = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, signal.SIG_IGN) for name in ignored]  # a child inherits what is ignored
    try:
        process.start()
    finally:
        for name, handler in zip(ignored, before):
            signal.signal(name, handler)
    return process


def _end_with_parent() -> None:
    """End this process at once, also in the middle of loading, when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _engine_main(config: Config, address: str) -> None:
    _end_with_parent()
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, left behind by one that is killed
    from baleen.engine import run_process

    run_process(config, address)


def _api_main(config: Config, listener: socket.socket, folder: Path, number: int, orders: Connection) -> None:
    _end_with_parent()
    api = _ApiProcess(config, Tokenizer.load(config), folder, number)
    sys.exit(uvloop.run(_serve_beside(api, listener, orders)))


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model loads, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ConfigError(flag, f"cannot listen on {host}:{port} ({error.strerror})", "choose another") from None
    return listener


class _ApiProcess:
    """The application on uvicorn, and its end of the socket to the engine."""

    def __init__(self, config: Config, tokenizer: Tokenizer, folder: Path, number: int) -> None:
        self.config = config
        self.client = EngineClient(_address(folder), number)
        counters = SharedCounters(folder / "counters", row=number, num_rows=config.server.tokenizer_worker_num)
        self.app = create_app(config, self.client, tokenizer, counters)
        verbose = config.server.log_level == "debug"
        self._server = _Server(
            uvicorn.Config(
                self.app,
                log_level="info" if verbose else "warning",
                access_log=verbose,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                lifespan="off",
            )
        )
        self._leaving: asyncio.Task[None] | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Until `stop` or `fail`, and all open requests have ended."""
        await self._server.serve(sockets=[listener])

    @property
    def stopping(self) -> bool:
        return self._leaving is not None

    def stop(self, name: signal.Signals) -> None:
        """Stop listening and let open requests end; a second Ctrl-C does not wait for them."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(_leave_slow_clients(self.client, self._server))
        self.client.start_draining()
        self._server.handle_exit(name, None)

    async def fail(self, message: str) -> None:
        """The engine is gone: end what is open with an error, let the errors out, stop serving."""
        had_requests = self.client.num_open > 0
        self.client.fail_all(message)
        await asyncio.sleep(FAIL_SECONDS if had_requests else 0.2)
        self._server.should_exit = True
        await asyncio.sleep(1.0)
        self._server.force_exit = True


class _Sibling:
    """Another API process, and the pipe for its orders: a signal's name to stop, text to fail with that message."""

    def __init__(self, config: Config, listener: socket.socket, folder: Path, number: int) -> None:
        self._arguments = (config, listener, folder, number)
        self._crashes: list[float] = []
        self.start()

    def start(self) -> None:
        orders, self._orders = multiprocessing.Pipe(duplex=False)
        self.process = _start(_api_main, *self._arguments, orders)
        orders.close()

    def tell(self, order: signal.Signals | str) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._orders.send(order)

    async def keep_alive(self, api: _ApiProcess) -> bool:
        """Start it anew whenever it crashes; returns when the server stops, False if this is why it must."""
        while True:
            reason = await _end_of(self.process)
            if api.stopping or api.client.dead is not None:
                return True
            print(f"baleen: error: API process {self._arguments[-1]} ended ({reason})", file=sys.stderr, flush=True)
            now = time.monotonic()
            self._crashes = [*(then for then in self._crashes if now - then < CRASH_SECONDS), now]
            if len(self._crashes) >= MOST_CRASHES:
                return False
            self.start()


async def _serve(api: _ApiProcess, listener: socket.socket, engine: BaseProcess, others: list[_Sibling]) -> int:
    """API process 0: serves, and watches the rest. Returns the exit code."""
    await api.client.start()

    def stop(name: signal.Signals) -> None:
        if not api.stopping and (count := int(api.app.state.service.metrics.open_sequences.total())):
            rest = "request" if count == 1 else "requests"
            print(f"baleen: stopping after {count} open {rest} (Ctrl-C again: now)", flush=True)
        for sibling in others:
            sibling.tell(name)
        api.stop(name)

    async def keep_alive(sibling: _Sibling) -> bool:
        if await sibling.keep_alive(api):
            return True
        stop(signal.SIGTERM)
        return False

    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop, name)
    engine_died = asyncio.create_task(_watch(engine, api, others))
    announced = asyncio.create_task(_announce(api))
    kept = [asyncio.create_task(keep_alive(sibling)) for sibling in others]
    await api.serve(listener)
    announced.cancel()
    all_well = all(await asyncio.gather(*kept))
    if engine.is_alive():
        engine_died.cancel()
        if not api.client.ready.is_set():
            engine.kill()  # it is loading, and listens to nobody
        await api.client.shutdown_engine()
        await asyncio.to_thread(engine.join, STOP_SECONDS)
    else:
        await engine_died
        all_well = False
    await api.client.close()
    return 0 if all_well else 1


async def _serve_beside(api: _ApiProcess, listener: socket.socket, orders: Connection) -> int:
    """Another API process: listens once it can serve, and does what it is told. Returns the exit code."""
    ordered = asyncio.Event()
    failing: list[asyncio.Task[None]] = []

    def obey() -> None:
        order = orders.recv()
        ordered.set()
        if isinstance(order, str):
            failing.append(asyncio.create_task(api.fail(order)))
        else:
            api.stop(order)

    await api.client.start()
    asyncio.get_running_loop().add_reader(orders.fileno(), obey)
    first = [asyncio.create_task(event.wait()) for event in (api.client.ready, ordered)]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if not ordered.is_set():
        await api.serve(listener)
    asyncio.get_running_loop().remove_reader(orders.fileno())
    for task in first:
        task.cancel()
    await api.client.close()
    return 1 if failing else 0


async def _leave_slow_clients(client: EngineClient, server: uvicorn.Server) -> None:
    """While draining: a client that sends half a request, or reads nothing, must not hold up the end."""
    while client.num_open:
        await asyncio.sleep(0.1)
    await asyncio.sleep(SLOW_CLIENT_SECONDS)
    for connection in list(server.server_state.connections):
        connection.transport.abort()


async def _announce(api: _ApiProcess) -> None:
    await api.client.ready.wait()
    server = api.config.server
    host = f"[{server.host}]" if ":" in server.host else server.host
    print(
        f"baleen: ready at http://{host}:{server.port} (weights loaded in {api.client.load_seconds:.1f} s;"
        " stop with Ctrl-C)",
        flush=True,
    )


async def _watch(engine: BaseProcess, api: _ApiProcess, others: list[_Sibling]) -> None:
    """When the engine process ends by itself, all API processes fail."""
    reason = await _end_of(engine)
    print(f"baleen: error: the engine process ended ({reason})", file=sys.stderr, flush=True)
    message = f"the engine process ended ({reason})"
    for sibling in others:
        sibling.tell(message)
    await api.fail(message)


async def _end_of(process: BaseProcess) -> str:
    """Wait until a process ends; returns how."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
    await asyncio.to_thread(process.join)
    code = process.exitcode
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
