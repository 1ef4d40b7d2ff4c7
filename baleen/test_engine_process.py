"""The engine's socket: every output goes to the API process that asked, and each request ends exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from baleen import engine
from baleen.engine import EngineProcess
from baleen.messages import (
    AbortRequest,
    CacheFlushed,
    EngineOutput,
    EngineReady,
    EngineStats,
    FlushCache,
    GenerateRequest,
    Hello,
    SamplingParams,
    Shutdown,
    TokenOutput,
    pack_ids,
)


class FakeEngine:
    """Says what it is told to."""

    def __init__(self, config: Any, *, progress: bool = False) -> None:
        self.runner = SimpleNamespace(num_pages=7, load_seconds=0.5)
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.says: list[TokenOutput] = []

    @property
    def has_work(self) -> bool:
        return bool(self.says)

    def add(self, request: GenerateRequest) -> None:
        self.added.append(request.rid)

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    def flush_cache(self) -> CacheFlushed:
        return CacheFlushed(True)

    def step(self) -> list[TokenOutput]:
        says, self.says = self.says, []
        return says

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.added))

    def close(self) -> None:
        pass


def output(rid: str, reason: Any = None) -> TokenOutput:
    totals = {"num_prompt_tokens": 1, "num_cached_tokens": 0, "num_output_tokens": 1}
    return TokenOutput(rid=rid, token_ids=(5,), finish_reason=reason, **totals)


def request(rid: str) -> GenerateRequest:
    return GenerateRequest(rid=rid, input_ids=pack_ids([1]), sampling=SamplingParams())


class ApiProcess:
    """The other end of the socket."""

    def __init__(self, address: str, name: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, name.encode())
        self._socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._socket.send(msgspec.msgpack.encode(message))

    def received(self) -> list[Any]:
        """All but the reports."""
        messages = []
        while self._socket.poll(100):
            messages.append(self._decoder.decode(self._socket.recv()))
        return [message for message in messages if not isinstance(message, EngineStats)]

    def outputs(self) -> list[tuple[str, Any]]:
        return [(o.rid, o.finish_reason) for message in self.received() for o in message.outputs]

    def close(self) -> None:
        self._socket.close(0)


class World:
    def __init__(self, folder: Path) -> None:
        config: Any = SimpleNamespace(server=SimpleNamespace(log_level="info"), cache=SimpleNamespace(page_size=64))
        self.address = f"ipc://{folder}/engine"
        self.process = EngineProcess(config, self.address)
        self.engine: Any = self.process.engine
        self.a, self.b = ApiProcess(self.address, "api-0"), ApiProcess(self.address, "api-1")
        for api in (self.a, self.b):
            api.send(Hello())
            self.turn()
            assert api.received() == [EngineReady(7, 64, 0.5)]

    def turn(self, *says: TokenOutput) -> None:
        """Read all there is, then say something."""
        while self.process._socket.poll(100):
            self.process._receive()
        self.engine.says = list(says)
        self.process._deliver(self.engine.step())

    def close(self) -> None:
        for socket in (self.a, self.b, self.process._socket):
            socket.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(engine, "Engine", FakeEngine)
    world = World(tmp_path)
    yield world
    world.close()


def test_outputs_go_to_who_asked(world: World) -> None:
    world.a.send(request("a1"), request("a2"))
    world.b.send(request("b1"))
    world.turn(output("a1"), output("b1"), output("a2"))
    assert world.a.outputs() == [("a1", None), ("a2", None)]
    assert world.b.outputs() == [("b1", None)]
    world.turn(output("b1", "stop"), output("b1"), output("stranger"))
    assert world.b.outputs() == [("b1", "stop")]
    assert world.a.outputs() == []


def test_a_rid_in_use_is_an_error_for_the_second(world: World) -> None:
    world.a.send(request("x"))
    world.turn()
    world.b.send(request("x"))
    world.turn(output("x"))
    (message,) = world.b.received()
    (refused,) = message.outputs
    assert (refused.rid, refused.finish_reason, refused.status) == ("x", "error", 400)
    assert world.a.outputs() == [("x", None)]
    assert world.engine.added == ["x"]
    world.turn(output("x", "length"))
    world.b.send(request("x"))
    world.turn(output("x"))
    assert world.b.outputs() == [("x", None)], "the name is free again"


def test_an_abort_is_confirmed_once(world: World) -> None:
    world.a.send(request("x"), AbortRequest("x"), AbortRequest("x"), AbortRequest("y"))
    world.turn(output("x"), output("x", "stop"))
    assert world.a.outputs() == [("x", "abort")]
    world.a.send(request("x"))
    world.turn(output("x", "stop"))
    world.a.send(AbortRequest("x"))
    world.turn()
    assert world.a.outputs() == [("x", "stop")], "it had ended: there is nothing to confirm"


def test_an_exact_abort_is_not_a_beginning(world: World) -> None:
    world.a.send(request("x"), request("x2"), AbortRequest("x"))
    world.turn(output("x2"))
    assert world.a.outputs() == [("x", "abort"), ("x2", None)]


@pytest.mark.parametrize(
    ("prefix", "aborted"), [("job", {"job", "job-2"}), ("", {"job", "job-2", "other"}), ("z", set())]
)
def test_a_beginning_aborts_requests_of_all_processes(world: World, prefix: str, aborted: set[str]) -> None:
    world.a.send(request("job"), request("other"))
    world.b.send(request("job-2"))
    world.turn()
    world.b.send(AbortRequest(prefix, prefix=True))
    world.turn()
    ended = world.a.outputs() + world.b.outputs()
    assert {rid for rid, _ in ended} == aborted
    assert all(reason == "abort" for _, reason in ended)
    assert set(world.engine.aborted) == aborted


def test_answers_and_reports(world: World) -> None:
    world.b.send(FlushCache())
    world.turn()
    assert world.b.received() == [CacheFlushed(True)]
    assert world.a.received() == []
    world.process._stats_sent = 0.0
    world.a.send(request("x"))
    world.turn()
    world.process._report()
    for api in (world.a, world.b):
        assert api._socket.poll(1000)
        assert api._decoder.decode(api._socket.recv()).num_running == 1


def test_a_process_in_the_place_of_a_dead_one(world: World) -> None:
    """What the dead one asked for is aborted; its successor hears nothing of it but a last word it ignores."""
    world.b.send(request("old"), request("old-2"))
    world.a.send(request("mine"))
    world.turn()
    world.b.close()
    world.turn(output("old"))
    successor = ApiProcess(world.address, "api-1")
    successor.send(Hello(), request("new"))
    world.turn(output("new"), output("mine"), output("old"))
    assert world.engine.aborted == ["old", "old-2"]
    messages = successor.received()
    assert EngineReady(7, 64, 0.5) in messages
    outputs = [(o.rid, o.finish_reason) for m in messages if not isinstance(m, EngineReady) for o in m.outputs]
    assert outputs[-1] == ("new", None)
    assert all(reason == "abort" for rid, reason in outputs if rid != "new")
    assert world.a.outputs() == [("mine", None)]
    successor.close()


def test_a_process_that_does_not_read_loses_nothing_and_stops_nobody(world: World) -> None:
    world.a.send(request("x"))
    world.turn()
    count = 5000
    for _ in range(count):
        world.process._deliver([output("x")])
    assert len(world.a.outputs()) == count


def test_shutdown_ends_the_loop(world: World) -> None:
    world.a.send(Shutdown())
    world.turn()
    world.process.run()
