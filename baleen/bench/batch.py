"""One static batch through the runner, as SGLang's bench_one_batch: prefill of every prompt, then decode steps.

The options are its own and any flag of `baleen serve`. Prompts are random ids; every run is measured after one that
warms up what is compiled, captured or cached.
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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from baleen import flags
from baleen.config import PAGE_SIZE, Config, ConfigError
from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
from baleen.runner.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Result:
    """Figures of one batch; times in milliseconds.

    decode_ms             median of a step that is waited for before the next begins, as SGLang measures
    decode_overlapped_ms  a step where the next is always started before it ends, as the engine runs
    """

    batch_size: int
    input_len: int
    output_len: int
    prefill_ms: float
    prefill_tokens_per_s: float
    decode_ms: float
    decode_overlapped_ms: float
    decode_tokens_per_s: float


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run `baleen bench batch`. 2 if a flag asks for what cannot be done."""
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
    given, serve_flags = parser.parse_known_args(argv)
    for name in ("batch_size", "input_len", "output_len"):
        if min(getattr(given, name)) < (2 if name == "output_len" else 1):
            raise ConfigError(
                "--" + name.replace("_", "-"), "is too small", "write at least 1, --output-len at least 2"
            )
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
    results = []
    for shape in itertools.product(given.batch_size, given.input_len, given.output_len):
        problem = _problem(config, *shape)
        if problem:
            print(f"batch of {shape[0]}, {shape[1]} in, {shape[2]} out: left out, {problem}", file=sys.stderr)
            continue
        results.append(measure(runner, config, *shape))
        print(_row(results[-1], header=len(results) == 1), flush=True)
    for result in results:
        line = json.dumps({**asdict(result), "device": config.load.device, "kernels": _kernels(config)})
        print(line)
        if given.result_filename is not None:
            with given.result_filename.open("a") as file:
                file.write(line + "\n")
    return 0


def _problem(config: Config, batch_size: int, input_len: int, output_len: int) -> str:
    pages = batch_size * -(-(input_len + output_len) // PAGE_SIZE)
    if pages * PAGE_SIZE > config.cache.max_total_tokens:
        return f"needs {pages * PAGE_SIZE} cached tokens, and there is room for {config.cache.max_total_tokens}"
    if input_len + output_len > config.load.context_length or batch_size > config.scheduler.max_running_requests:
        return "beyond --context-length or --max-running-requests"
    return ""


def measure(runner: ModelRunner, config: Config, batch_size: int, input_len: int, output_len: int) -> Result:
    """One batch, run twice: the figures are the second's."""
    chooser = random.Random(0)
    prompts = [
        tuple(chooser.randrange(3, config.model.vocab_size) for _ in range(input_len)) for _ in range(batch_size)
    ]
    prefill_s = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for batch in _prefill(prompts, output_len, config.scheduler.chunked_prefill_size):
            launched = runner.execute(batch)
        launched.wait()
        prefill_s = time.perf_counter() - started
        times = []
        for batch in _decode(batch_size, input_len, output_len):
            started = time.perf_counter()
            runner.execute(batch).wait()
            times.append(time.perf_counter() - started)
    overlapped_s = _overlapped(runner, batch_size, input_len, output_len)
    decode_s = statistics.median(times)
    return Result(
        batch_size,
        input_len,
        output_len,
        prefill_ms=1000 * prefill_s,
        prefill_tokens_per_s=batch_size * input_len / prefill_s,
        decode_ms=1000 * decode_s,
        decode_overlapped_ms=1000 * overlapped_s,
        decode_tokens_per_s=batch_size / overlapped_s,
    )


def _overlapped(runner: ModelRunner, batch_size: int, input_len: int, output_len: int) -> float:
    """Seconds of a decode step, the same steps again, each started before the one before it has ended."""
    started = time.perf_counter()
    before = None
    for batch in _decode(batch_size, input_len, output_len):
        launched = runner.execute(batch)
        if before is not None:
            before.wait()
        before = launched
    assert before is not None
    before.wait()
    return (time.perf_counter() - started) / (output_len - 1)


def _prefill(prompts: list[tuple[int, ...]], output_len: int, tokens_per_step: int) -> Iterator[ScheduledBatch]:
    """Every prompt in chunks that fill the steps; each request has its pages from the start."""
    num_pages = -(-(len(prompts[0]) + output_len) // PAGE_SIZE)
    rows: list[ScheduledRow] = []
    room = tokens_per_step
    for slot, prompt in enumerate(prompts):
        first = 1 + slot * num_pages
        pages = tuple(range(first, first + num_pages))
        opened: OpenSlot | None = OpenSlot(sampling=GREEDY, pages=pages, num_prompt=len(prompt))
        start = 0
        while start < len(prompt):
            chunk = prompt[start : start + room]
            last = start + len(chunk) == len(prompt)
            rows.append(ScheduledRow(slot=slot, start=start, token_ids=chunk, sample=last, open=opened))
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
    titles = ("batch", "in", "out", "prefill ms", "prefill tok/s", "decode ms", "overlapped ms", "decode tok/s")
    cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in asdict(result).values()]
    widths = [max(6, len(title)) for title in titles]
    lines = ([titles] if header else []) + [tuple(cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
