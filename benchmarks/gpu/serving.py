"""The engine's own loop on config B: how long the GPU has nothing to do in steady decode, and start to ready.

The API process is played by the main thread: messages are the engine's, its socket two queues.
"""

from __future__ import annotations

import contextlib
import json
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from gpu import wire
from gpu.speed import TINY
from gpu.stages import CONFIGS, Report, environment, table

IDLE_SHARE = 0.03  # target: of steady decode, between steps
WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 30, 150, 60
COLD_SECONDS, WARM_SECONDS = 60, 20  # targets of start to ready
CHILD_SECONDS = 125
MARKS = ("python", "torch", "CUDA", "config", "ready", "first answer", "long prompt", "every size answered")


def config_of(folder: Path, device: str, **settings: Any) -> Any:
    """Config B with random weights, or something tiny on a CPU."""
    from baleen.flags import default_config

    shutil.copyfile(CONFIGS / "B.json", folder / "config.json")
    if device == "cpu":
        settings = {**settings, "json_model_override_args": TINY[1]}
    return default_config(str(folder), load_format="dummy", device=device, kv_cache_dtype="fp8_e4m3", **settings)


class Client:
    """An engine process in a thread, and what an API process does with it, without HTTP and text."""

    def __init__(self, config: Any, sockets: list[wire.Router]) -> None:
        import msgspec

        from baleen.engine import EngineProcess
        from baleen.messages import EngineOutput

        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EngineOutput).decode
        self.process = EngineProcess(config, "here")
        self._socket = sockets[-1]
        self._thread = threading.Thread(target=self.process.run, name="engine")
        self._thread.start()
        self._vocab = config.model.vocab_size
        self._requests = 0

    def ask(self, count: int, prompt_tokens: int, new_tokens: int) -> None:
        """Greedy requests with random prompts, no two alike."""
        from baleen.messages import GenerateRequest, SamplingParams, pack_ids

        sampling = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True, seed=0)
        for _ in range(count):
            chooser = random.Random(self._requests)
            ids = [chooser.randrange(3, self._vocab) for _ in range(prompt_tokens)]
            rid = f"r{self._requests}"
            self._socket.deliver(self._encode(GenerateRequest(rid=rid, input_ids=pack_ids(ids), sampling=sampling)))
            self._requests += 1

    def step(self) -> tuple[float, Any]:
        """The next message with tokens, and when it came."""
        while True:
            try:
                data = self._socket.outbox.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the engine has ended, see the log") from None
                continue
            arrived = time.perf_counter()
            outputs = getattr(self._decode(data), "outputs", None)
            if outputs:
                return arrived, outputs

    def until_done(self, count: int) -> None:
        """Read until so many requests have ended."""
        while count:
            for output in self.step()[1]:
                if output.finish_reason == "error":
                    raise RuntimeError(output.message)
                count -= output.finish_reason is not None

    def close(self) -> None:
        from baleen.messages import Shutdown

        self._socket.deliver(self._encode(Shutdown()))
        self._thread.join()


def server(device: str, report: Report) -> None:
    """Steady decode at a batch of 64: time of a step as the client sees it, with and without the profiler, and the
    share of time in which the GPU runs nothing.
    """
    sockets = wire.stand_in()
    size, length = (64, 4096) if device == "cuda" else (4, 100)
    warm, timed, profiled = (WARM_STEPS, TIMED_STEPS, PROFILED_STEPS) if device == "cuda" else (3, 5, 5)
    new = warm + timed + 20 * profiled  # the engine goes on while the profiler starts
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(
            Path(folder),
            device,
            max_running_requests=size,
            context_length=-(-(length + new) // 64) * 64,
            skip_server_warmup=True,
        )
        client = Client(config, sockets)
    started = time.perf_counter()
    client.ask(size, length, new)
    while len(client.step()[1]) < size:
        pass
    report.add("prompts", requests=size, tokens=length, seconds=time.perf_counter() - started)
    for _ in range(warm):
        client.step()
    runner = client.process.engine.runner
    begun, forward = time.perf_counter(), runner.forwards.seconds
    times = [client.step()[0] for _ in range(timed)]
    steady = [b - a for a, b in pairwise(times)]
    share = (runner.forwards.seconds - forward) / (time.perf_counter() - begun)
    report.add("steady", step_ms=1000 * median(steady), slowest_ms=1000 * max(steady), in_forward=share)
    if device == "cuda":
        idle(client, profiled, median(steady), config, report)
    client.close()


def idle(client: Client, count: int, step_seconds: float, config: Any, report: Report) -> None:
    """Record some steps, leave out the first and the last, and see when no kernel runs. It counts only if most of the
    steps are in the record.
    """
    from baleen.bench import trace
    from baleen.runner.measurement import record

    times: list[float] = []

    def some_steps() -> None:
        waited = 0.0
        while waited < step_seconds / 2:  # what came while the profiler started is read first
            begun = time.perf_counter()
            client.step()
            waited = time.perf_counter() - begun
        times.extend(client.step()[0] for _ in range(count))

    activities = [trace.Activity(*one) for one in record(some_steps, client.process.engine.runner.device)]
    cut = trace.graph_steps(activities)[count // 6 : -2] or trace.steps(activities, 1)
    window = list(chain.from_iterable(step.activities for step in cut))
    shares = trace.idle_shares(window)
    text = trace.table("decode step in the server's loop", window, len(cut), config.model.num_hidden_layers)
    (report.path.parent / "profile_server.txt").write_text(text)
    profiled_ms = 1000 * median(b - a for a, b in pairwise(times))
    report.add(
        "idle",
        ok=shares["between"] < IDLE_SHARE and len(cut) > count // 2,
        steps=len(cut),
        step_ms=profiled_ms,
        **shares,
    )
    names = ("idle", "in graphs", "between")
    print(
        table([[len(cut), profiled_ms, *(100 * shares[n] for n in names)]], ["steps", "ms", *(f"{n} %" for n in names)])
    )
    print(f"idle between steps {100 * shares['between']:.2f} %, target under {100 * IDLE_SHARE:.0f} %")


def start(device: str, report: Report) -> None:
    """From the start of the process until it is ready, and until requests of every batch size have been answered: with
    empty caches of compiled kernels, then with the caches that left.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            name: str(Path(folder) / name) for name in ("DG_JIT_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
        }
        try:
            for label, target in (("cold", COLD_SECONDS), ("warm", WARM_SECONDS)):

                def check(label: str = label, target: float = target) -> dict[str, Any]:
                    out = Path(folder) / f"{label}.json"
                    command = [sys.executable, str(Path(__file__)), device, repr(time.time()), str(out)]
                    environ = environment(caches)
                    environ["PYTHONPATH"] = f"{Path(__file__).parent.parent}:{environ['PYTHONPATH']}"
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        subprocess.run(command, check=True, timeout=CHILD_SECONDS, env=environ)
                    marks = json.loads(out.read_text())
                    done = marks.get("every size answered", float("inf"))
                    return {"ok": done < target, "target": target, "seconds": marks}

                values = report.attempt(label, check)
                if "seconds" in values:
                    rows.append([label, *(values["seconds"].get(name) for name in MARKS), target])
        finally:
            print(table(rows, ["", *MARKS, "target"]))


def start_child(device: str, began: float, out: Path) -> None:
    """Seconds since `began` at each stage of a start. Written at each, so that a crash leaves what was there."""
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[name] = time.time() - began
        print(f"{name}: {marks[name]:.1f} s", flush=True)
        out.write_text(json.dumps(marks))

    sockets = wire.stand_in()
    mark("python")
    import torch

    mark("torch")
    if device == "cuda":
        torch.zeros(1, device="cuda")
        mark("CUDA")
    sizes, length = ([1, 16, 64], 4096) if device == "cuda" else ([1, 3], 100)
    with tempfile.TemporaryDirectory() as folder:
        context = length + 128
        config = config_of(Path(folder), device, max_running_requests=max(sizes), context_length=context)
        mark("config")
        client = Client(config, sockets)
    mark("ready")
    client.ask(1, 40, 4)
    client.until_done(1)
    mark("first answer")
    client.ask(1, length, 4)
    client.until_done(1)
    mark("long prompt")
    for size in sizes:
        client.ask(size, 40, 4)
        client.until_done(size)
    mark("every size answered")
    client.close()


if __name__ == "__main__":
    start_child(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
