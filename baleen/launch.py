"""Starts the engine process beside this one, which serves HTTP; watches it; stops both.

This process never imports torch: the engine process does, in `_engine_main`.
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
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn
import uvloop

from baleen.chat.tokenizer import Tokenizer
from baleen.config import Config, ConfigError
from baleen.server.app import create_app
from baleen.server.engine_client import EngineClient

DRAIN_SECONDS = 600  # how long SIGTERM waits for open requests
SLOW_CLIENT_SECONDS = 10.0  # how long SIGTERM waits for clients to send or to read the rest, when nothing runs any more
FAIL_SECONDS = 2.0  # how long open responses have to carry the error away once the engine is dead
STOP_SECONDS = 10.0  # how long the engine has to end after `Shutdown`


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
    listener = _listen(config.server.host, config.server.port)
    with tempfile.TemporaryDirectory(prefix="baleen-") as folder:
        engine_input, engine_output = f"ipc://{folder}/in", f"ipc://{folder}/out"
        process = _start(_engine_main, config, engine_input, engine_output)
        try:
            return uvloop.run(_serve(config, tokenizer, listener, process, engine_input, engine_output))
        finally:
            if process.is_alive():
                process.kill()
            process.join()


def build_random_checkpoint(folder: Path) -> None:
    """Make `folder` hold the small random checkpoint; in a process of its own, because it needs torch.

    Raises ConfigError.
    """
    process = _start(_build_main, folder)
    try:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        raise ConfigError(
            "--model", f"the random checkpoint in {folder} could not be built", "give a checkpoint folder"
        )


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


def _build_main(folder: Path) -> None:
    _end_with_parent()
    from baleen.model import random_checkpoint

    try:
        random_checkpoint.build_random_checkpoint(folder)
    except OSError as error:
        sys.exit(f"baleen: error: {error}")


def _engine_main(config: Config, engine_input: str, engine_output: str) -> None:
    _end_with_parent()
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, left behind by one that is killed
    from baleen.engine import run_process

    run_process(config, engine_input, engine_output)


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


async def _serve(
    config: Config,
    tokenizer: Tokenizer,
    listener: socket.socket,
    process: BaseProcess,
    engine_input: str,
    engine_output: str,
) -> int:
    client = EngineClient(engine_input, engine_output)
    await client.start()
    app = create_app(config, client, tokenizer)
    verbose = config.server.log_level == "debug"
    server = _Server(
        uvicorn.Config(
            app,
            log_level="info" if verbose else "warning",
            access_log=verbose,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            lifespan="off",
        )
    )

    slow: asyncio.Task[None] | None = None

    def stop(name: signal.Signals) -> None:
        nonlocal slow
        if slow is None:
            slow = asyncio.create_task(_leave_slow_clients(client, server))
            if client.num_open:
                rest = "request" if client.num_open == 1 else "requests"
                print(f"baleen: stopping after {client.num_open} open {rest} (Ctrl-C again: now)", flush=True)
        client.start_draining()
        server.handle_exit(name, None)

    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop, name)
    engine_died = asyncio.create_task(_watch(process, client, server))
    announced = asyncio.create_task(_announce(config, client))
    await server.serve(sockets=[listener])
    announced.cancel()
    if process.is_alive():
        engine_died.cancel()
        if not client.ready.is_set():
            process.kill()  # it is loading, and listens to nobody
        await client.shutdown_engine()
        await asyncio.to_thread(process.join, STOP_SECONDS)
        await client.close()
        return 0
    await engine_died
    await client.close()
    return 1


async def _leave_slow_clients(client: EngineClient, server: uvicorn.Server) -> None:
    """While draining: a client that sends half a request, or reads nothing, must not hold up the end."""
    while client.num_open:
        await asyncio.sleep(0.1)
    await asyncio.sleep(SLOW_CLIENT_SECONDS)
    for connection in list(server.server_state.connections):
        connection.transport.abort()


async def _announce(config: Config, client: EngineClient) -> None:
    await client.ready.wait()
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    print(
        f"baleen: ready at http://{host}:{config.server.port} (weights loaded in {client.load_seconds:.1f} s;"
        " stop with Ctrl-C)",
        flush=True,
    )


async def _watch(process: BaseProcess, client: EngineClient, server: uvicorn.Server) -> None:
    """When the engine process ends by itself: fail what is open, let the errors out, stop serving."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
    await asyncio.to_thread(process.join)
    code = process.exitcode
    reason = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    print(f"baleen: error: the engine process ended ({reason})", file=sys.stderr, flush=True)
    had_requests = client.num_open > 0
    client.fail_all(f"the engine process ended ({reason})")
    await asyncio.sleep(FAIL_SECONDS if had_requests else 0.2)
    server.should_exit = True
    await asyncio.sleep(1.0)
    server.force_exit = True
