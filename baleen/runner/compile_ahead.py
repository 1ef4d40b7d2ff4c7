"""A first start on a GPU: several processes compile the kernels of the warm-up, which then finds them on disk.

Each builds a model of one layer of each kind, with random weights, and runs shares of the warm-up's steps; the caches
of Triton and DeepGEMM may be written by many. The FP8 products are shares of their own, a layer with some numbers of
tokens: in the steps they are left to the reference, or each step would compile most of the same ones again.

Nothing depends on it: what a process that fails leaves uncompiled, the warm-up compiles.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, NamedTuple

import torch
from tqdm import tqdm

from baleen import memory_plan
from baleen.config import FASTEST, PAGE_SIZE, Config, ModelConfig
from baleen.kernels import compile_cache
from baleen.messages import ScheduledBatch
from baleen.model.layers import Activation, Linear
from baleen.model.moe import MoE
from baleen.runner.measurement import fill_cache
from baleen.runner.model_runner import ModelRunner, empty_model, use_kernels
from baleen.runner.warm_up import decode_shapes, prefill_steps

STALL_SECONDS = 300.0  # without a share done: something hangs
CONTEXT_BYTES = 600 * 2**20  # of a process on the GPU, besides what the memory plan knows
MEMORY_SHARE = 0.9  # of the free memory
SIZES_OF_A_SHARE = 4  # numbers of tokens whose products are one share: a kernel each, or fewer
SHOWN_LINES = 3  # of what a process that failed wrote last
_CHILD = "import sys; sys.path[:] = {path!r}; from baleen.runner.compile_ahead import work; work({fd})"


class Products(NamedTuple):
    """The FP8 products of a linear layer, or a mixture of experts. layer: its name in the model; sizes: of tokens."""

    layer: str
    sizes: tuple[int, ...]


class Decode(NamedTuple):
    """A decode step of so many rows at a padded context."""

    size: int
    context: int


Share = Products | ScheduledBatch | Decode


def compile_ahead(config: Config, *, progress: bool = False) -> Path | None:
    """Compile what the warm-up of a resolved `config` will need, if this is a GPU and it is not marked as done.

    Returns the mark to `remember` once the warm-up has run; None if it is set, or nothing is compiled. When it returns,
    its processes have ended and their memory is free.
    """
    if config.load.device != "cuda" or config.attention.kernels != FASTEST:
        return None
    small = cut(config)
    todo = shares(small)
    settings = (
        small.model, small.load.dtype, small.load.context_length, small.cache, small.attention,
        small.scheduler.max_running_requests, todo,
    )  # fmt: skip
    try:
        mark = compile_cache.mark_of(repr(settings))
    except ModuleNotFoundError:
        return None
    if mark.exists():
        return None
    count = num_processes(small, len(todo), torch.cuda.mem_get_info()[0])
    if count > 1:
        run_shares(small, todo, count, progress=progress)
    return mark


def remember(mark: Path | None) -> None:
    """Set the mark. A cache that cannot be written to is left without."""
    with contextlib.suppress(OSError):
        if mark is not None:
            mark.touch()


def cut(config: Config) -> Config:
    """The same with a layer of each kind, no MTP layer, random weights, and no more pages than the prefill steps use.

    Numbers of tokens, requests and pages that a kernel sees stay as they are.
    """
    steps = list(prefill_steps(config, config.cache.max_total_tokens // PAGE_SIZE))
    rows = [row for step in steps for row in step.rows]
    num_pages = max(max(row.open.pages) for row in rows if row.open is not None)
    return replace(
        config,
        model=_cut_model(config.model),
        load=replace(config.load, load_format="dummy", random_seed=0),
        cache=replace(config.cache, max_total_tokens=num_pages * PAGE_SIZE),
        scheduler=replace(config.scheduler, chunked_prefill_size=max(row.num_tokens for row in rows)),
    )


def _cut_model(model: ModelConfig) -> ModelConfig:
    num_dense = min(model.first_k_dense_replace, model.num_hidden_layers, 1)
    num_moe = min(max(model.num_hidden_layers - model.first_k_dense_replace, 0), 1)
    return replace(
        model, num_hidden_layers=num_dense + num_moe, first_k_dense_replace=num_dense, num_nextn_predict_layers=0
    )


def shares(config: Config) -> list[Share]:
    """Of a cut config, in the order in which they are handed out: first those that compile most, one kernel after the
    other, so that what they have in common is there for the rest.
    """
    steps = list(prefill_steps(config, config.cache.max_total_tokens // PAGE_SIZE))
    longest, *others = sorted(steps, key=lambda step: -step.rows[0].num_tokens)
    decode = sorted((Decode(*shape) for shape in decode_shapes(config)), reverse=True)
    linear: dict[torch.Size, str] = {}
    experts: list[str] = []
    for name, module in empty_model(config, torch.device("meta")).named_modules():
        if isinstance(module, Linear) and module.takes_fp8:
            linear.setdefault(module.weight.shape, name)
        elif isinstance(module, MoE) and module.takes_fp8:
            experts.append(name)
    chunk = longest.rows[0].num_tokens
    sizes = _sizes_of_products({step.rows[0].num_tokens for step in steps} | {shape.size for shape in decode})
    parts = [tuple(sizes[i : i + SIZES_OF_A_SHARE]) for i in range(0, len(sizes), SIZES_OF_A_SHARE)]
    products = [Products(layer, part) for part in parts for layer in linear.values()]
    return [
        longest,
        *(Products(layer, (chunk, *sizes[-1:])) for layer in experts),
        *decode[:1],
        *decode[1:][-1:],
        *others[-1:],
        *products,
        *others[:-1],
        *decode[1:-1],
    ]


def _sizes_of_products(sizes: set[int]) -> list[int]:
    """These numbers of tokens and some between, falling: DeepGEMM's choice of a kernel changes in smaller steps than
    ours.
    """
    powers = [1 << i for i in range(4, max(sizes).bit_length())]
    between = {power * quarters // 4 for power in powers for quarters in (5, 6, 7)}
    return sorted(sizes | {size for size in between if size < max(sizes)}, reverse=True)


def num_processes(config: Config, num_shares: int, free_bytes: int) -> int:
    """How many may run at once: a share and a CPU core each, and together within the GPU's free memory."""
    each = memory_plan.plan(config, free_bytes).total + CONTEXT_BYTES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, num_shares, int(free_bytes * MEMORY_SHARE) // each)


class _Worker:
    """A process that compiles, this end of its pipe, and what it writes. Raises OSError if it cannot be started.

    A plain interpreter, not a process of `multiprocessing`, which would run the main module of an offline caller again.
    """

    def __init__(self, config: Config) -> None:
        self.connection, theirs = Pipe()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-c", _CHILD.format(path=sys.path, fd=theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # with the compilers that it starts
            )
        self.send(config)

    def send(self, message: Config | Share) -> None:
        """If it has gone, its pipe tells when it is read."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return " | ".join([line.strip() for line in lines if line.strip()][-SHOWN_LINES:]) or "it wrote nothing"

    def end(self) -> None:
        """At once, and wait for it: its memory is free afterwards."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        self._output.close()


def run_shares(config: Config, todo: Sequence[Share], count: int, *, progress: bool = False) -> None:
    """Run shares of a cut config in `count` processes; whoever is idle takes the next. A process that fails takes its
    share with it and is told in one line. All have ended when this returns or raises.
    """
    left = deque(todo)
    workers: dict[Connection, _Worker] = {}
    busy: set[Connection] = set()
    failures: list[str] = []
    bar = tqdm(total=len(todo), desc="compiling kernels ahead", unit=" steps", disable=not progress)
    try:
        for _ in range(count):
            worker = _Worker(config)
            workers[worker.connection] = worker
        while workers and (left or busy):  # one that is still starting may come too late
            ready = wait(list(workers), STALL_SECONDS)
            if not ready:
                failures.append(f"no step was done for {STALL_SECONDS:.0f} s")
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                worker = workers[connection]
                busy.discard(connection)
                try:
                    num_done = connection.recv()
                except (EOFError, OSError):
                    failures.append(worker.last_words())
                else:
                    bar.update(num_done)
                    if left:
                        worker.send(left.popleft())
                        busy.add(connection)
                        continue
                del workers[connection]
                worker.end()
    except OSError as error:
        failures.append(str(error))
    finally:
        for worker in workers.values():
            worker.end()
        bar.close()
    if failures:
        print(
            f"baleen: warning: compiling kernels ahead failed in {len(failures)} of {count} processes, the start takes"
            f" longer: {failures[-1]}",
            file=sys.stderr,
            flush=True,
        )


def work(fd: int) -> None:
    """The main of such a process. Takes a config from the pipe `fd`, then shares, one at a time; says how many it has
    done whenever it can take the next: 0, then 1. Ends with the pipe.
    """
    os.set_inheritable(fd, False)  # a compiler must not hold the pipe open
    connection = Connection(fd)
    config = connection.recv()
    received: queue.SimpleQueue[Share] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                received.put(connection.recv())
        except (EOFError, OSError):  # whoever started this is gone
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    runner = ModelRunner(config)
    fill_cache(runner.backend.pool)  # a second chunk reads what no first one may have written
    connection.send(0)
    while True:
        run_share(runner, config, received.get())
        connection.send(1)


@torch.inference_mode()
def run_share(runner: ModelRunner, config: Config, share: Share) -> None:
    """Compile and run what it needs; returns when the device is done."""
    if isinstance(share, Products):
        use_kernels(config.attention)
        layer = runner.model.get_submodule(share.layer)
        assert isinstance(layer, Linear | MoE)
        width = layer.weight.shape[1] if isinstance(layer, Linear) else config.model.hidden_size
        for size in share.sizes:
            x = torch.randn(size, width, dtype=getattr(torch, config.load.dtype), device=runner.device)
            layer(Activation(x))
    else:
        use_kernels(config.attention, fp8_gemm="reference")
        if isinstance(share, ScheduledBatch):
            runner.execute(share).wait()
        else:
            assert runner.graphs is not None
            runner.graphs.compile(*share)
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
