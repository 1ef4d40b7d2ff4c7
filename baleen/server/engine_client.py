"""An API process's end of the socket to the engine: requests down, outputs up to the HTTP request they are for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import msgspec
import zmq
import zmq.asyncio

from baleen.messages import (
    AbortRequest,
    CacheFlushed,
    EngineInput,
    EngineOutput,
    EngineReady,
    EngineStats,
    FinishReason,
    FlushCache,
    GenerateRequest,
    Hello,
    Shutdown,
    TokenOutput,
    TokenOutputs,
)
from baleen.server.errors import ApiError, bad_request

SILENCE_SECONDS = 120.0  # an engine with open requests that says nothing for so long is not healthy
THROUGHPUT_SECONDS = 1.0  # over at least so long
LINGER_MS = 500  # how long `close` waits for the last message to leave

_log = logging.getLogger(__name__)


class OutputChannel:
    """The outputs of all sequences of one HTTP request, in order of arrival. One reader."""

    def __init__(self) -> None:
        self._outputs: list[TokenOutput] = []
        self._arrived: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def get(self) -> list[TokenOutput]:
        """All outputs since the last call, at least one: a reader that is late gets many at once and catches up."""
        if not self._outputs:
            self._arrived = asyncio.get_running_loop().create_future()
            try:
                await self._arrived
            finally:
                self._arrived = None
        outputs, self._outputs = self._outputs, []
        return outputs


class EngineClient:
    """Connects a DEALER to the engine at `address`, as API process number `process` (each its own).

    One event loop calls everything; `submit`, `abort` and `fail_all` never wait.

    ready       set when the engine has loaded the model
    dead        why the engine is gone, once `fail_all` was called; nothing is sent any more
    stats       the engine's latest report
    throughput  tokens generated per second between its last reports
    """

    def __init__(self, address: str, process: int = 0) -> None:
        self.ready = asyncio.Event()
        self.dead: str | None = None
        self.stats = EngineStats()
        self.throughput = 0.0
        self.load_seconds = 0.0
        self._draining = False
        self.process = process
        self._address = address
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._open: dict[str, OutputChannel] = {}
        self._leaving: Counter[str] = Counter()  # aborted; until its last output comes, what comes for a rid is theirs
        self._flushes: list[asyncio.Future[CacheFlushed]] = []
        self._heard = time.monotonic()
        self._measured = (time.monotonic(), 0)  # when, and the tokens generated until then
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[EngineOutput] = msgspec.msgpack.Decoder(EngineOutput)

    async def start(self) -> None:
        """Open the socket and begin to listen. The engine may come later."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, f"api-{self.process}".encode())
        # High-water marks off: a send then never waits, and nothing is lost while a reader is slow.
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.connect(self._address)
        self._send(Hello())
        self._receiver = asyncio.create_task(self._receive(self._socket), name="engine-outputs")

    async def close(self) -> None:
        """Stop listening and free the sockets; what is still open ends with an error."""
        if self.dead is None:
            self.fail_all("the server is shutting down")
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiver
        if self._context is not None:
            assert self._socket is not None
            self._socket.close(LINGER_MS)
            await asyncio.to_thread(self._context.term)
            self._context = self._socket = None

    @property
    def num_open(self) -> int:
        """Sequences submitted and not ended."""
        return len(self._open)

    def refusal(self) -> str | None:
        """Why no request is taken now; None if it is."""
        if self.dead is not None:
            return self.dead
        if self._draining:
            return "the server is shutting down"
        return None if self.ready.is_set() else "the model is still loading"

    def problem(self) -> str | None:
        """Why the server is not healthy: `refusal`, or an engine that should speak and does not; None if it is."""
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        silence = time.monotonic() - self._heard
        if self._open and silence > SILENCE_SECONDS:
            return f"the engine has said nothing for {silence:.0f} s"
        return None

    def start_draining(self) -> None:
        """Take no new requests from now on; the open ones go on."""
        self._draining = True

    def submit(self, requests: Sequence[GenerateRequest], channel: OutputChannel) -> None:
        """Send sequences whose outputs shall come to `channel`.

        Raises ApiError 503 if the engine cannot take them, 400 for a rid that is in use here; the engine itself answers
        so for one that is in use in another API process.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise ApiError(503, refusal, code="engine_unavailable")
        for request in requests:
            if request.rid in self._open:
                raise bad_request("rid", f"{request.rid!r} is that of an open request", "duplicate_request_id")
        if not self._open:
            self._heard = time.monotonic()  # silence counts from now: an idle engine need not speak
        for request in requests:
            self._open[request.rid] = channel
            self._send(request)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        """The outputs of one sequence, the last one with a finish_reason. Leaving early aborts it."""
        channel = OutputChannel()
        self.submit([request], channel)
        try:
            while True:
                for output in await channel.get():
                    yield output
                    if output.finish_reason is not None:
                        return
        finally:
            self.abort(request.rid)

    def abort(self, rid: str) -> bool:
        """Stop a sequence; nothing more comes to its channel. False if it had ended."""
        if self._open.pop(rid, None) is None:
            return False
        if self.dead is None:
            self._leaving[rid] += 1
            self._send(AbortRequest(rid))
        return True

    def abort_matching(self, prefix: str) -> None:
        """Stop every sequence whose rid starts so, also those of other API processes; each gets its last output."""
        if self.dead is None:
            self._send(AbortRequest(prefix, prefix=True))

    def fail_all(self, message: str) -> None:
        """The engine is gone: end every open sequence with an error, and refuse new ones."""
        self.dead = message
        open_requests, self._open = self._open, {}
        for rid, channel in open_requests.items():
            channel.put(_ended(rid, "error", message, 500))
        for flush in self._flushes:
            if not flush.done():
                flush.set_result(CacheFlushed(False, message))
        self._flushes.clear()

    async def flush_cache(self) -> CacheFlushed:
        """Empty the engine's prefix cache, if it can. Raises ApiError 503 if there is no engine."""
        refusal = self.refusal()
        if refusal is not None:
            raise ApiError(503, refusal, code="engine_unavailable")
        answer: asyncio.Future[CacheFlushed] = asyncio.get_running_loop().create_future()
        self._flushes.append(answer)  # answers come in the order of the questions
        self._send(FlushCache())
        return await answer

    async def shutdown_engine(self) -> None:
        """Ask the engine process to end. Requests still open end with finish_reason "abort"."""
        self._draining = True
        if self.dead is not None:
            return
        self._send(Shutdown())
        open_requests, self._open = self._open, {}
        for rid, channel in open_requests.items():
            channel.put(_ended(rid, "abort", "the server is shutting down", 503))

    def _send(self, message: EngineInput) -> None:
        assert self._socket is not None, "start() was not called"
        self._socket.send(self._encode(message))  # sent or queued when it returns: nothing to await

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        try:
            while True:
                self._handle(self._decoder.decode(await socket.recv()))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.exception("cannot read from the engine")
            self.fail_all(f"cannot read from the engine: {error}")

    def _handle(self, message: EngineOutput) -> None:
        self._heard = time.monotonic()
        match message:
            case TokenOutputs(outputs):
                for output in outputs:
                    self._pass_on(output)
            case EngineStats():
                self._measure(message)
                self.stats = message
            case EngineReady():
                self.load_seconds = message.load_seconds
                self.ready.set()
            case CacheFlushed():
                if self._flushes:
                    answer = self._flushes.pop(0)
                    if not answer.done():
                        answer.set_result(message)

    def _pass_on(self, output: TokenOutput) -> None:
        rid, last = output.rid, output.finish_reason is not None
        if rid in self._leaving:  # it was aborted while this was on its way, and the same rid may be in use again
            if last:
                self._leaving -= Counter((rid,))
            return
        channel = self._open.pop(rid, None) if last else self._open.get(rid)
        if channel is not None:
            channel.put(output)

    def _measure(self, stats: EngineStats) -> None:
        """Update `throughput`, over at least a second: reports come when something changed, or each second."""
        now, total = time.monotonic(), stats.num_generated_tokens_total
        since, before = self._measured
        if now - since >= THROUGHPUT_SECONDS:
            self.throughput = (total - before) / (now - since)
            self._measured = (now, total)


def _ended(rid: str, reason: FinishReason, message: str, status: int) -> TokenOutput:
    return TokenOutput(
        rid=rid,
        token_ids=(),
        num_prompt_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        finish_reason=reason,
        message=message,
        status=status,
    )
