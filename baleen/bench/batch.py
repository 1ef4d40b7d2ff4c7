"""One static batch through the runner, as SGLang's bench_one_batch: prefill of every prompt, then decode steps.

The options are its own and any flag of `baleen serve`. Prompts are random ids; every run is measured after one that
warms up what is compiled, captured or cached. `--profile` then runs some steps once more and writes their kernels.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baleen import flags
from baleen.bench import trace
from baleen.config import PAGE_SIZE, Config, ConfigError
from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
from baleen.runner.measurement import fill_cache, record
from baleen.runner.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)
PROFILED_STEPS = 5  # of decode


@dataclass(frozen=True)
class Result:
    """Figures of one batch; times in milliseconds.

    prefill_*             None where there was none: --skip-prefill
    decode_ms             median of a step that is waited for before the next begins, as SGLang measures
    decode_start_ms       median of the host's part of it, until the step has been started; on a CPU it has ended then
    decode_overlapped_ms  a step where the next is always started before it ends, as the engine runs
    """

    batch_size: int
    input_len: int
    output_len: int
    prefill_ms: float | None
    prefill_tokens_per_s: float | None
    decode_ms: float
    decode_start_ms: float
    decode_overlapped_ms: float
    decode_tokens_per_s: float


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run `baleen bench batch`. 2 if a flag asks for what cannot be done."""
    given, serve_flags = _parse(argv)
    longest = max(given.input_len) + max(given.output_len)
    # what the flags given do not say: as large as these batches need
    sized = [
        "--max-running-requests", str(max(given.batch_size)), "--context-length", str(longest + PAGE_SIZE),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if given.config_only is not None:
            shutil.copyfile(given.config_only, Path(folder) / "config.json")
            sized += ["--model", folder, "--load-format", "dummy"]
        resolution = flags.resolve([*sized, *serve_flags], environ)
        for line in [*resolution.warnings, *resolution.refusals]:
            print(f"baleen: {line}", file=sys.stderr)
        if resolution.refusals:
            return 2
        print(f"memory plan:\n{resolution.plan.table()}", file=sys.stderr)
        runner = ModelRunner(resolution.config, progress=sys.stderr.isatty())
    config = resolution.config
    print(f"loaded in {runner.load_seconds:.1f} s: {config.load.device}, {_kernels(config)}", file=sys.stderr)
    if given.skip_prefill:
        fill_cache(runner.backend.pool)
    lines: list[str] = []
    batches = []
    for shape in itertools.product(given.batch_size, given.input_len, given.output_len):
        problem = _problem(config, *shape)
        if problem:
            print(f"batch of {shape[0]}, {shape[1]} in, {shape[2]} out: left out, {problem}", file=sys.stderr)
            continue
        batch = Batch(runner, config, *shape, skip_prefill=given.skip_prefill)
        result = batch.measure()
        batches.append(batch)
        print(_row(result, header=not lines), flush=True)
        lines.append(json.dumps({**asdict(result), "device": config.load.device, "kernels": _kernels(config)}))
        if given.result_filename is not None:
            with given.result_filename.open("a") as file:
                file.write(lines[-1] + "\n")
    # Last: a profiler that was on once may slow down what comes after.
    for batch in batches if given.profile else ():
        batch.profile(given.profile_filename_prefix, name_length=len(given.input_len) > 1)
    print("\n".join(lines))
    return 0


def _parse(argv: list[str]) -> tuple[Any, list[str]]:
    """The options of this command, and the rest: flags of `baleen serve`. Raises ConfigError."""
    parser = flags.Parser(
        prog="baleen bench batch",
        usage="baleen bench batch (--model CHECKPOINT | --config-only FILE) [options] [flags of baleen serve]",
        description="One static batch, without a server: prefill and decode steps.",
    )
    parser.add_argument(
        "--config-only", type=Path, metavar="FILE", help="a config.json: random weights are made for it"
    )
    parser.add_argument("--batch-size", "--batch", type=int, nargs="+", default=[1], metavar="N", help="requests")
    parser.add_argument("--input-len", type=int, nargs="+", default=[1024], metavar="N", help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, nargs="+", default=[16], metavar="N", help="tokens of each reply")
    parser.add_argument("--result-filename", type=Path, metavar="FILE", help="append a line of JSON for each batch")
    parser.add_argument(
        "--skip-prefill", action="store_true", help="fill the cache with random tokens instead: decode steps alone"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write the kernels of a prefill and of a decode step, with the pauses"
    )
    parser.add_argument(
        "--profile-filename-prefix", default="profile", metavar="PATH",
        help="of the files <prefix>_prefill_B<batch size>.txt and <prefix>_decode_B<batch size>.txt",
    )  # fmt: skip
    given, serve_flags = parser.parse_known_args(argv)
    for name in ("batch_size", "input_len", "output_len"):
        if min(getattr(given, name)) < (2 if name == "output_len" else 1):
            raise ConfigError(
                "--" + name.replace("_", "-"), "is too small", "write at least 1, --output-len at least 2"
            )
    return given, serve_flags


def _problem(config: Config, batch_size: int, input_len: int, output_len: int) -> str:
    pages = batch_size * -(-(input_len + output_len) // PAGE_SIZE)
    if pages * PAGE_SIZE > config.cache.max_total_tokens:
        return f"needs {pages * PAGE_SIZE} cached tokens, and there is room for {config.cache.max_total_tokens}"
    if input_len + output_len > config.load.context_length or batch_size > config.scheduler.max_running_requests:
        return "beyond --context-length or --max-running-requests"
    return ""


class Batch:
    """One static batch on a runner: requests of one length, each with its slot and pages."""

    def __init__(
        self,
        runner: ModelRunner,
        config: Config,
        batch_size: int,
        input_len: int,
        output_len: int,
        *,
        skip_prefill: bool = False,
    ) -> None:
        self._runner, self._skip_prefill = runner, skip_prefill
        self._batch_size, self._input_len, self._output_len = batch_size, input_len, output_len
        self._num_layers = config.model.num_hidden_layers
        self._chunk = config.scheduler.chunked_prefill_size
        chooser = random.Random(0)
        vocab_size = config.model.vocab_size
        length = 1 if skip_prefill else input_len
        self._prompts = [tuple(chooser.randrange(3, vocab_size) for _ in range(length)) for _ in range(batch_size)]

    def measure(self) -> Result:
        """The batch, run twice: the figures are the second's."""
        prefill_s = 0.0
        for _ in range(2):
            started = time.perf_counter()
            self._run(self._prefill())
            prefill_s = time.perf_counter() - started
            times, starts = [], []
            for batch in self._decode():
                began = time.perf_counter()
                launched = self._runner.execute(batch)
                starts.append(time.perf_counter() - began)
                launched.wait()
                times.append(time.perf_counter() - began)
        started = time.perf_counter()
        self._run_overlapped(self._decode())
        overlapped_s = (time.perf_counter() - started) / (self._output_len - 1)
        tokens = self._batch_size * self._input_len
        return Result(
            self._batch_size,
            self._input_len,
            self._output_len,
            prefill_ms=None if self._skip_prefill else 1000 * prefill_s,
            prefill_tokens_per_s=None if self._skip_prefill else tokens / prefill_s,
            decode_ms=1000 * statistics.median(times),
            decode_start_ms=1000 * statistics.median(starts),
            decode_overlapped_ms=1000 * overlapped_s,
            decode_tokens_per_s=self._batch_size / overlapped_s,
        )

    def profile(self, prefix: str, *, name_length: bool) -> None:
        """Run it once more, and write what the device did in the last prefill step and in some decode steps.

        name_length   the files' names hold the prompts' length too
        """
        device = self._runner.device
        ending = f"B{self._batch_size}" + (f"_in{self._input_len}" if name_length else "")
        shape = f"batch of {self._batch_size}, {self._input_len} in"
        if not self._skip_prefill:
            *before, last = self._prefill()
            self._run(before)
            activities = record(lambda: self._run([last]), device)
            tokens = sum(row.num_tokens for row in last.rows)
            self._write(f"{prefix}_prefill_{ending}.txt", f"prefill step of {tokens} tokens, {shape}", activities, 1)
        else:
            self._run(self._prefill())
        batches = list(itertools.islice(self._decode(), PROFILED_STEPS))
        activities = record(lambda: self._run_overlapped(batches), device)
        self._write(f"{prefix}_decode_{ending}.txt", f"decode step, {shape}", activities, len(batches))

    def _write(self, path: str, title: str, recorded: Iterable[tuple[str, float, float, int, int]], count: int) -> None:
        activities = [trace.Activity(*one) for one in recorded]
        Path(path).write_text(trace.table(title, activities, count, self._num_layers))
        print(f"{title}: {path}", file=sys.stderr)

    def _prefill(self) -> Iterator[ScheduledBatch]:
        """Steps that leave every prompt in the cache and a first token sampled; where prefill is skipped, one step of
        the last token of each.
        """
        if self._skip_prefill:
            return _prefill(self._prompts, self._input_len + self._output_len, self._batch_size, self._input_len - 1)
        return _prefill(self._prompts, self._input_len + self._output_len, self._chunk)

    def _decode(self) -> Iterator[ScheduledBatch]:
        return _decode(self._batch_size, self._input_len, self._output_len)

    def _run(self, batches: Iterable[ScheduledBatch]) -> None:
        launched = None
        for batch in batches:
            launched = self._runner.execute(batch)
        if launched is not None:
            launched.wait()

    def _run_overlapped(self, batches: Iterable[ScheduledBatch]) -> None:
        """Each step is started before the one before it has ended."""
        before = None
        for batch in batches:
            launched = self._runner.execute(batch)
            if before is not None:
                before.wait()
            before = launched
        if before is not None:
            before.wait()


def _prefill(
    prompts: list[tuple[int, ...]], length: int, tokens_per_step: int, first_position: int = 0
) -> Iterator[ScheduledBatch]:
    """Every prompt in chunks that fill the steps; each request has pages for `length` tokens from the start.

    first_position   of a prompt's first token; what is before it is in the cache
    """
    num_pages = -(-length // PAGE_SIZE)
    rows: list[ScheduledRow] = []
    room = tokens_per_step
    for slot, prompt in enumerate(prompts):
        first = 1 + slot * num_pages
        pages = tuple(range(first, first + num_pages))
        opened: OpenSlot | None = OpenSlot(sampling=GREEDY, pages=pages, num_prompt=first_position + len(prompt))
        start = 0
        while start < len(prompt):
            chunk = prompt[start : start + room]
            last = start + len(chunk) == len(prompt)
            position = first_position + start
            rows.append(ScheduledRow(slot=slot, start=position, token_ids=chunk, sample=last, open=opened))
            start, room, opened = start + len(chunk), room - len(chunk), None
            if room == 0:
                yield ScheduledBatch(0, _decode_first(rows))
                rows, room = [], tokens_per_step
    if rows:
        yield ScheduledBatch(0, _decode_first(rows))


def _decode_first(rows: list[ScheduledRow]) -> tuple[ScheduledRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.num_tokens > 1))


def _decode(batch_size: int, input_len: int, output_len: int) -> Iterator[ScheduledBatch]:
    for step in range(output_len - 1):
        rows = tuple(ScheduledRow(slot=slot, start=input_len + step) for slot in range(batch_size))
        yield ScheduledBatch(step, rows)


def _kernels(config: Config) -> str:
    graphs = "no graphs" if config.load.device == "cpu" or config.scheduler.disable_cuda_graph else "graphs"
    attention = f"{config.attention.prefill_backend} / {config.attention.decode_backend}"
    return f"{config.load.dtype}, kv {config.cache.kv_cache_dtype}, {attention}, {config.attention.kernels}, {graphs}"


def _row(result: Result, *, header: bool) -> str:
    """One line of the table, with the header before the first."""
    titles = (
        "batch",
        "in",
        "out",
        "prefill ms",
        "prefill tok/s",
        "decode ms",
        "start ms",
        "overlapped ms",
        "decode tok/s",
    )
    values = ["-" if value is None else value for value in asdict(result).values()]
    cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in values]
    widths = [max(6, len(title)) for title in titles]
    lines = ([titles] if header else []) + [tuple(cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
