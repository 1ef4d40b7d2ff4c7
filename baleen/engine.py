"""One replica's loop: receive, schedule, run, send.

Step n+1 is scheduled while step n runs: the runner has a thread of its own and always finds the next batch waiting, so
the time of scheduling, of updating requests and of talking to the API process is hidden behind the forward. Only this
file knows of it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import msgspec
import zmq

from baleen.chat.tokenizer import Tokenizer
from baleen.config import Config
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
from baleen.runner.compile_ahead import compile_ahead, remember
from baleen.runner.model_runner import LaunchedStep, ModelRunner
from baleen.runner.warm_up import warm_up
from baleen.sampling.grammar_compiler import GrammarCompiler
from baleen.sampling.grammar_text import GrammarError, Vocabulary
from baleen.scheduler.scheduler import Scheduler

STATS_SECONDS = 0.25  # at most this often while stepping
HEARTBEAT_SECONDS = 1.0  # at least this often, also when idle
COMPILE_POLL_SECONDS = 0.01  # with nothing to run, a step waits so long for a grammar; messages wait with it


class Compiling(NamedTuple):
    """A request whose grammar is on its way."""

    request: GenerateRequest
    arrived: float
    compiled: Future[Any]


class Engine:
    """Scheduler and runner of one replica. Not thread-safe: one thread calls every method.

    `step` returns the tokens of the step before the one it starts, so call it until `has_work` is false.
    """

    def __init__(self, config: Config, *, progress: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runner")
        # In its own thread from the start: each thread that runs parallel torch code gets a pool of OpenMP threads, and
        # two pools on the same cores make every barrier several times slower.
        self._compiler = GrammarCompiler(lambda: _vocabulary(config))
        warms_up = not config.scheduler.skip_server_warmup
        mark = compile_ahead(config, progress=progress) if warms_up else None
        self.runner = self._thread.submit(ModelRunner, config, self._compiler, progress=progress).result()
        if warms_up:
            self._thread.submit(warm_up, self.runner, config, progress=progress).result()
        remember(mark)
        self.scheduler = Scheduler(
            num_pages=self.runner.num_pages,
            page_size=config.cache.page_size,
            max_running_requests=config.scheduler.max_running_requests,
            chunked_prefill_size=config.scheduler.chunked_prefill_size,
            schedule_policy=config.scheduler.schedule_policy,
            schedule_conservativeness=config.scheduler.schedule_conservativeness,
            disable_radix_cache=config.cache.disable_radix_cache,
            context_length=config.load.context_length,
            eos_token_ids=config.model.eos_token_ids,
            enable_priority=config.scheduler.enable_priority_scheduling,
            low_priority_values_first=config.scheduler.schedule_low_priority_values_first,
            waiting_timeout=config.scheduler.request_waiting_timeout,
            running_timeout=config.scheduler.request_running_timeout,
        )
        self.overlap = not config.scheduler.disable_overlap_schedule
        self._running: deque[Future[LaunchedStep]] = deque()  # in step order: one, two for a moment within `step`
        self._outputs: list[TokenOutput] = []
        self._compiling: dict[str, Compiling] = {}  # by rid, in order of arrival
        self._compiled: dict[str, Any] = {}  # by rid: held so that the compiler keeps it until the request has ended
        self._num_aborted = 0  # while compiling

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._outputs or self._compiling) or self.scheduler.has_work()

    def add(self, request: GenerateRequest) -> None:
        """Queue a request; if it can never run, a later `step` returns its error.

        One with a grammar is queued when that is compiled, which keeps no other waiting.
        """
        now = time.monotonic()
        if request.sampling.grammar is None:
            self._queue(request, now)
        else:
            self._compiling[request.rid] = Compiling(request, now, self._compiler.submit(request.sampling.grammar))

    def abort(self, rid: str) -> None:
        """Forget a request and free its pages now; ids that are not here are ignored."""
        self._compiled.pop(rid, None)
        if self._compiling.pop(rid, None) is not None:
            self._num_aborted += 1
        else:
            self.scheduler.abort(rid)

    def flush_cache(self) -> CacheFlushed:
        """Empty the prefix cache; refused while requests are here."""
        if self.has_work:
            return CacheFlushed(False, "requests are running or waiting")
        return self.scheduler.flush_cache()

    def step(self) -> list[TokenOutput]:
        """Start the next step and return what the one before it brought. Raises what the runner raised.

        May be interrupted (Ctrl-C) while it waits for the runner: the next call goes on from there.
        """
        self._queue_compiled()
        outputs, self._outputs = self._outputs, []
        if not self.overlap:
            outputs += self._finish(leave=0)
        outputs += self.scheduler.expire()
        batch = self.scheduler.schedule()
        if batch is not None:
            self._running.append(self._thread.submit(self.runner.execute, batch))
        elif self._compiling and not self._running:
            wait([each.compiled for each in self._compiling.values()], COMPILE_POLL_SECONDS, FIRST_COMPLETED)
        outputs += self._finish(leave=0 if batch is None else 1)
        for output in outputs:
            if output.finish_reason is not None:
                self._compiled.pop(output.rid, None)
        return outputs

    def _queue(self, request: GenerateRequest, arrived: float) -> None:
        refused = self.scheduler.add(request, arrived)
        if refused is not None:
            self._outputs.append(refused)

    def _queue_compiled(self) -> None:
        """Queue the requests whose grammar is there, and answer those whose grammar does not compile."""
        if self._compiling:
            self._compiler.expire()
        for rid, (request, arrived, compiled) in list(self._compiling.items()):
            if not compiled.done():
                continue
            del self._compiling[rid]
            error = compiled.exception()
            if isinstance(error, GrammarError):
                self._outputs.append(_last_output(rid, "error", str(error), error.status))
            else:
                self._compiled[rid] = compiled.result()
                self._queue(request, arrived)

    def _finish(self, leave: int) -> list[TokenOutput]:
        """Wait for the oldest steps, all but the last `leave`."""
        outputs: list[TokenOutput] = []
        while len(self._running) > leave:
            output = self._running[0].result().wait()
            self._running.popleft()
            outputs += self.scheduler.update(output)
        return outputs

    def stats(self) -> EngineStats:
        stats, masks = self.scheduler.stats(), self.runner.grammars
        return msgspec.structs.replace(
            stats,
            num_aborted_total=stats.num_aborted_total + self._num_aborted,
            forward_seconds_total=self.runner.forwards.seconds,
            num_grammar_queue=len(self._compiling),
            num_grammar_compiled_total=self._compiler.num_compiled,
            num_grammar_failed_total=self._compiler.num_failed,
            grammar_compile_seconds_total=self._compiler.compile_seconds,
            grammar_mask_seconds_total=masks.mask_seconds,
            grammar_wait_seconds_total=masks.wait_seconds,
        )

    def close(self) -> None:
        """Wait for the step that runs and end the threads."""
        self._thread.shutdown(wait=True)
        self.runner.grammars.close()


class EngineProcess:
    """An `Engine` behind a ROUTER at `address`; each API process connects a DEALER with an identity of its own.

    Outputs go to the API process that sent the request; an identity that nobody has (any more) loses its messages.
    """

    def __init__(self, config: Config, address: str) -> None:
        self._socket = zmq.Context().socket(zmq.ROUTER)
        self._socket.set(zmq.SNDHWM, 0)  # a ROUTER drops what does not fit
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)  # a process started anew takes over the identity
        self._socket.bind(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineInput] = msgspec.msgpack.Decoder(EngineInput)
        self._clients: set[bytes] = set()  # identities that said Hello
        self._owners: dict[str, bytes] = {}  # rid of each open request -> who sent it
        self._stats = EngineStats()
        self._stats_sent = 0.0
        self._stop = False
        self.engine = Engine(config, progress=sys.stderr.isatty() or config.server.log_level != "error")
        self._ready = EngineReady(self.engine.runner.num_pages, config.cache.page_size, self.engine.runner.load_seconds)

    def run(self) -> None:
        """Serve until `Shutdown`."""
        while not self._stop:
            self._receive()
            if self.engine.has_work:
                self._deliver(self.engine.step())
            self._report()
        self.engine.close()
        self._socket.close()

    def _receive(self) -> None:
        """Handle every message that waits; when idle, wait for one until the next heartbeat."""
        if not self.engine.has_work:
            self._socket.poll(int(HEARTBEAT_SECONDS * 1000))
        with contextlib.suppress(zmq.Again):
            while True:
                sender, data = self._socket.recv_multipart(zmq.NOBLOCK)
                self._handle(sender, self._decoder.decode(data))

    def _handle(self, sender: bytes, message: EngineInput) -> None:
        match message:
            case GenerateRequest():
                if message.rid in self._owners:
                    problem = f"rid: {message.rid!r} is that of an open request"
                    refused = _last_output(message.rid, "error", problem, 400)
                    self._send(sender, TokenOutputs((refused,)))
                else:
                    self._owners[message.rid] = sender
                    self.engine.add(message)
            case AbortRequest(rid, prefix):
                self._abort([r for r in self._owners if r.startswith(rid)] if prefix else [rid])
            case FlushCache():
                self._send(sender, self.engine.flush_cache())
            case Hello():
                self._clients.add(sender)
                self._abort([rid for rid, owner in self._owners.items() if owner == sender])
                self._send(sender, self._ready)
            case Shutdown():
                self._stop = True

    def _abort(self, rids: list[str]) -> None:
        for rid in rids:
            self.engine.abort(rid)
        self._deliver([_last_output(rid, "abort", "aborted by request", 200) for rid in rids])

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """To each API process its own, in one message; what comes after a request's last output is dropped."""
        by_owner: dict[bytes, list[TokenOutput]] = {}
        for output in outputs:
            rid = output.rid
            owner = self._owners.get(rid) if output.finish_reason is None else self._owners.pop(rid, None)
            if owner is not None:
                by_owner.setdefault(owner, []).append(output)
        for owner, own in by_owner.items():
            self._send(owner, TokenOutputs(tuple(own)))

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._stats_sent < STATS_SECONDS:
            return
        stats = self.engine.stats()
        if stats != self._stats or now - self._stats_sent >= HEARTBEAT_SECONDS:
            for client in self._clients:
                self._send(client, stats)
            self._stats, self._stats_sent = stats, now

    def _send(self, client: bytes, message: EngineOutput) -> None:
        self._socket.send_multipart([client, self._encoder.encode(message)])


def _vocabulary(config: Config) -> Vocabulary:
    tokenizer = Tokenizer.load(config)
    tokens = [tokenizer.token_bytes(i) for i in range(config.model.vocab_size)]
    return Vocabulary(tokens, tokenizer.added_ids, config.model.eos_token_ids)


def _last_output(rid: str, reason: FinishReason, message: str, status: int) -> TokenOutput:
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


def run_process(config: Config, address: str) -> None:
    """The engine process's main; `launch` starts it, keeps signals from it, ends it with its parent."""
    try:
        process = EngineProcess(config, address)
    except ValueError as error:  # a checkpoint or setting that cannot be served: its message names the fix
        sys.exit(f"baleen: error: {error}")
    process.run()
