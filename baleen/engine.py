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
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import zmq

from baleen.config import Config
from baleen.messages import (
    AbortRequest,
    CacheFlushed,
    EngineInput,
    EngineOutput,
    EngineReady,
    EngineStats,
    FlushCache,
    GenerateRequest,
    Shutdown,
    StepOutput,
    TokenOutput,
    TokenOutputs,
)
from baleen.runner.model_runner import ModelRunner
from baleen.scheduler.scheduler import Scheduler

STATS_SECONDS = 0.25  # at most this often while stepping
HEARTBEAT_SECONDS = 1.0  # at least this often, also when idle


class Engine:
    """Scheduler and runner of one replica. Not thread-safe: one thread calls every method.

    `step` returns the tokens of the step before the one it starts, so call it until `has_work` is false.
    """

    def __init__(self, config: Config, *, progress: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runner")
        # In its own thread from the start: each thread that runs parallel torch code gets a pool of OpenMP threads, and
        # two pools on the same cores make every barrier several times slower.
        self.runner = self._thread.submit(ModelRunner, config, progress=progress).result()
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
        )
        self.overlap = not config.scheduler.disable_overlap_schedule
        self._running: deque[Future[StepOutput]] = deque()  # in step order: one, two for a moment within `step`
        self._outputs: list[TokenOutput] = []

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._outputs) or self.scheduler.has_work()

    def add(self, request: GenerateRequest) -> None:
        """Queue a request; if it can never run, the next `step` returns its error."""
        refused = self.scheduler.add(request)
        if refused is not None:
            self._outputs.append(refused)

    def abort(self, rid: str) -> None:
        """Forget a request and free its pages now; ids that are not here are ignored."""
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
        outputs, self._outputs = self._outputs, []
        if not self.overlap:
            outputs += self._finish(leave=0)
        batch = self.scheduler.schedule()
        if batch is not None:
            self._running.append(self._thread.submit(self.runner.execute, batch))
        return outputs + self._finish(leave=0 if batch is None else 1)

    def _finish(self, leave: int) -> list[TokenOutput]:
        """Wait for the oldest steps, all but the last `leave`."""
        outputs: list[TokenOutput] = []
        while len(self._running) > leave:
            output = self._running[0].result()
            self._running.popleft()
            outputs += self.scheduler.update(output)
        return outputs

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(self.scheduler.stats(), forward_seconds_total=self.runner.forward_seconds)

    def close(self) -> None:
        """Wait for the step that runs and end the runner's thread."""
        self._thread.shutdown(wait=True)


class EngineProcess:
    """An `Engine` behind two sockets: it binds a PULL for `EngineInput` and connects a PUSH for `EngineOutput`."""

    def __init__(self, config: Config, input_address: str, output_address: str) -> None:
        context = zmq.Context()
        self._input = context.socket(zmq.PULL)
        self._input.bind(input_address)
        self._output = context.socket(zmq.PUSH)
        self._output.connect(output_address)
        self._output.setsockopt(zmq.LINGER, 1000)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineInput] = msgspec.msgpack.Decoder(EngineInput)
        self._stats = EngineStats()
        self._stats_sent = 0.0
        self._stop = False
        self.engine = Engine(config, progress=sys.stderr.isatty() or config.server.log_level != "error")
        self._send(EngineReady(self.engine.runner.num_pages, config.cache.page_size, self.engine.runner.load_seconds))

    def run(self) -> None:
        """Serve until `Shutdown`."""
        while not self._stop:
            self._receive()
            if self.engine.has_work:
                outputs = self.engine.step()
                if outputs:
                    self._send(TokenOutputs(tuple(outputs)))
            self._report()
        self.engine.close()
        self._output.close()

    def _receive(self) -> None:
        """Handle every message that waits; when idle, wait for one until the next heartbeat."""
        if not self.engine.has_work:
            self._input.poll(int(HEARTBEAT_SECONDS * 1000))
        with contextlib.suppress(zmq.Again):
            while True:
                self._handle(self._decoder.decode(self._input.recv(zmq.NOBLOCK)))

    def _handle(self, message: EngineInput) -> None:
        match message:
            case GenerateRequest():
                self.engine.add(message)
            case AbortRequest(rid):
                self.engine.abort(rid)
            case FlushCache():
                self._send(self.engine.flush_cache())
            case Shutdown():
                self._stop = True

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._stats_sent < STATS_SECONDS:
            return
        stats = self.engine.stats()
        if stats != self._stats or now - self._stats_sent >= HEARTBEAT_SECONDS:
            self._send(stats)
            self._stats, self._stats_sent = stats, now

    def _send(self, message: EngineOutput) -> None:
        self._output.send(self._encoder.encode(message))


def run_process(config: Config, input_address: str, output_address: str) -> None:
    """The engine process's main; `launch` starts it, keeps signals from it, ends it with its parent."""
    try:
        process = EngineProcess(config, input_address, output_address)
    except ValueError as error:  # a checkpoint or setting that cannot be served: its message names the fix
        sys.exit(f"baleen: error: {error}")
    process.run()
