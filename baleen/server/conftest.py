"""A scripted engine behind the real sockets, and the real application on uvicorn in front of it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
import tokenizers
import uvicorn
import uvloop
import zmq
from fastapi import FastAPI

from baleen.chat.conftest import VOCAB_SIZE, build_tokenizer
from baleen.chat.encoding import EOS
from baleen.chat.tokenizer import Tokenizer
from baleen.config import PUBLISHED, Config
from baleen.flags import default_config
from baleen.messages import (
    AbortRequest,
    CacheFlushed,
    EngineInput,
    EngineReady,
    FlushCache,
    GenerateRequest,
    Hello,
    Shutdown,
    TokenLogprobs,
    TokenOutput,
    TokenOutputs,
    unpack_ids,
)
from baleen.server.app import create_app
from baleen.server.engine_client import EngineClient

CONTEXT = 256
_MARKS = (
    "｜DSML｜", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip


def tokenizer_with_marks() -> tokenizers.Tokenizer:
    """The small tokenizer, in which the marks of tool calls are tokens of their own, special as DeepSeek's are."""
    inner = build_tokenizer()
    inner.add_special_tokens([tokenizers.AddedToken(mark, normalized=False, special=True) for mark in _MARKS])
    return inner


EOS_ID = tokenizer_with_marks().token_to_id(EOS)


@dataclass
class Script:
    """What the engine answers, and what it saw.

    reply         ids to say, then eos; or a function of the request that gives them
    per_step      tokens in one output
    pause         seconds between steps
    fail_after    with this many tokens said, end with finish_reason "error"
    refusal       the same, of status 400 and with this message, as for a grammar that does not compile
    hold          say nothing at all
    """

    reply: list[int] | Callable[[GenerateRequest], list[int]] = field(default_factory=list)
    per_step: int = 1
    pause: float = 0.0
    fail_after: int | None = None
    refusal: str = ""
    hold: bool = False
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    flush_answer: CacheFlushed = field(default_factory=lambda: CacheFlushed(True))


class FakeEngine(threading.Thread):
    """Speaks the engine's side of the protocol from a script."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True, name="fake-engine")
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(address)
        self._clients: set[bytes] = set()
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._running: dict[str, tuple[GenerateRequest, list[int], int]] = {}
        self._owners: dict[str, bytes] = {}
        self._to_send: list[object] = []
        self._stop_wanted = threading.Event()
        self.script = Script()
        self.ready = True
        self.shut_down = threading.Event()

    def run(self) -> None:
        while not self._stop_wanted.is_set():
            busy = self._running and not self.script.hold
            if self._socket.poll(0 if busy else 5):
                sender, data = self._socket.recv_multipart()
                self._handle(sender, self._decoder.decode(data))
            elif busy:
                time.sleep(self.script.pause)
                self._step()
            while self._to_send and self._clients:
                message = self._to_send.pop(0)
                for client in self._clients:
                    self._send(client, message)
        self._socket.close(0)

    def stop(self) -> None:
        self._stop_wanted.set()
        self.join()

    @property
    def idle(self) -> bool:
        return not self._running

    def said(self, rid: str) -> int:
        """Tokens of a request that runs."""
        return self._running[rid][2]

    def send(self, message: object) -> None:
        """To every API process, soon: from any thread."""
        self._to_send.append(message)

    def _send(self, client: bytes, message: object) -> None:
        self._socket.send_multipart([client, msgspec.msgpack.encode(message)])

    def _handle(self, sender: bytes, message: EngineInput) -> None:
        script = self.script
        match message:
            case Hello():
                self._clients.add(sender)
                if self.ready:
                    self._send(sender, EngineReady(num_pages=100, page_size=64, load_seconds=1.5))
            case GenerateRequest():
                script.requests.append(message)
                self._owners[message.rid] = sender
                reply = script.reply(message) if callable(script.reply) else script.reply
                self._running[message.rid] = (message, [*reply, EOS_ID], 0)
            case AbortRequest(rid, prefix):
                for name in [r for r in self._running if r == rid or (prefix and r.startswith(rid))]:
                    script.aborted.append(name)
                    request, _, said = self._running.pop(name)
                    last = TokenOutput(
                        rid=name,
                        token_ids=(),
                        num_prompt_tokens=len(unpack_ids(request.input_ids)),
                        num_cached_tokens=3,
                        num_output_tokens=said,
                        finish_reason="abort",
                        message="aborted by request",
                        status=200,
                    )
                    self._send(self._owners.pop(name), TokenOutputs((last,)))
            case FlushCache():
                self._send(sender, script.flush_answer)
            case Shutdown():
                self.shut_down.set()

    def _step(self) -> None:
        outputs: dict[bytes, list[TokenOutput]] = {}
        for rid in list(self._running):
            outputs.setdefault(self._owners[rid], []).append(self._output(rid))
        for owner, own in outputs.items():
            self._send(owner, TokenOutputs(tuple(own)))

    def _output(self, rid: str) -> TokenOutput:
        request, reply, said = self._running[rid]
        sampling = request.sampling
        ids = reply[said : said + self.script.per_step][: sampling.max_new_tokens - said]
        reason, matched, message = None, None, ""
        first = not said
        stops = () if sampling.ignore_eos else (EOS_ID, *sampling.stop_token_ids)
        at = next((i for i, token in enumerate(ids) if token in stops), None)
        if at is not None:
            ids, reason, matched = ids[: at + 1], "stop", ids[at]
        said += len(ids)
        if reason is None and (said >= sampling.max_new_tokens or said >= len(reply)):
            reason = "length"
        if self.script.fail_after is not None and said > self.script.fail_after:
            ids, reason, matched, message = [], "error", None, "the logits held NaN"
        if reason is None:
            self._running[rid] = (request, reply, said)
        else:
            del self._running[rid]
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.logprobs is not None:
            top = sampling.logprobs
            logprobs = tuple(TokenLogprobs(-0.5, tuple((t + i, -0.5 - i) for i in range(top))) for t in ids)
        prompt_logprobs: list[TokenLogprobs | None] = []
        if sampling.prompt_logprobs is not None and first:
            for at, t in enumerate(unpack_ids(request.input_ids)):
                top = ((t, -at / 8),) * min(1, sampling.logprobs or 0)
                prompt_logprobs.append(TokenLogprobs(-at / 8, top) if at else None)
            prompt_logprobs = prompt_logprobs[sampling.prompt_logprobs :]
        return TokenOutput(
            rid=rid,
            token_ids=tuple(ids),
            num_prompt_tokens=len(unpack_ids(request.input_ids)),
            num_cached_tokens=3,
            num_output_tokens=said,
            logprobs=logprobs,
            finish_reason=reason,
            matched=matched,
            message=self.script.refusal or message,
            status=400 if self.script.refusal else 500,
            prompt_logprobs=tuple(prompt_logprobs),
        )


def make_config(folder: Path, **overrides: object) -> Config:
    """Of a model of `VOCAB_SIZE` ids; nothing of it is run."""
    published = next(iter(PUBLISHED.values()))
    small = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_size": 256, "n_routed_experts": 16}
    raw = published | small | {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS_ID}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer_with_marks().save(str(folder / "tokenizer.json"))
    settings = {
        "load_format": "dummy",
        "context_length": CONTEXT,
        "max_total_tokens": 4096,
        "served_model_name": "tiny-whale",
        "random_seed": 7,
    }
    return default_config(folder, **(settings | overrides))


@dataclass
class Server:
    """The application on a port of the loopback, in a thread with its own event loop."""

    url: str
    client: EngineClient
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop
    tokenizer: Tokenizer
    app: FastAPI

    @property
    def config(self) -> Config:
        config: Config = self.app.state.service.config
        return config

    @property
    def script(self) -> Script:
        return self.engine.script

    def play(self, text: str = "", **fields: object) -> Script:
        """Let the engine answer `text` from now on."""
        self.engine.script = Script(**({"reply": self.tokenizer.encode(text)} | fields))
        return self.engine.script

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run something on the server's event loop."""
        self.loop.call_soon_threadsafe(function, *args)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)


@contextmanager
def running_server(folder: Path, *, ready: bool = True, **overrides: object) -> Iterator[Server]:
    config = make_config(folder, **overrides)
    tokenizer = Tokenizer.load(config)
    address = f"ipc://{folder}/engine"
    engine = FakeEngine(address)
    engine.ready = ready
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    state: dict[str, object] = {}

    async def main() -> None:
        client = EngineClient(address)
        await client.start()
        app = create_app(config, client, tokenizer)
        options = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(options)
        state.update(client=client, server=server, app=app, loop=asyncio.get_running_loop())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        if ready:
            await client.ready.wait()
        while not server.started:
            await asyncio.sleep(0.005)
        started.set()
        await serving
        await client.close()

    thread = threading.Thread(target=lambda: uvloop.run(main()), daemon=True, name="server")
    engine.start()
    thread.start()
    assert started.wait(20)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Server(url, state["client"], engine, state["loop"], tokenizer, state["app"])
    finally:
        state["server"].should_exit = True
        thread.join(10)
        engine.stop()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def _session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(_session_server: Server) -> Server:
    """A server whose engine is alive, with a fresh script. Tests that break it start their own."""
    wait_until(lambda: _session_server.client.num_open == 0 and _session_server.engine.idle)
    _session_server.play()
    return _session_server


@pytest.fixture(scope="session")
def _session_agent_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("agent"), context_length=8192, max_total_tokens=32768) as server:
        yield server


@pytest.fixture
def agent(_session_agent_server: Server) -> Server:
    """As `server`, with a context that the tools of an agent fit into."""
    wait_until(lambda: _session_agent_server.client.num_open == 0 and _session_agent_server.engine.idle)
    _session_agent_server.play()
    return _session_agent_server


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> float:
    """Seconds until `condition` holds; fails if it never does."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never happened"
        time.sleep(0.005)
    return time.monotonic() - start
