"""What a GPU compiles and captures at first use, before there is a request: the first ones find it ready."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from baleen.config import PAGE_SIZE, Config
from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
from baleen.runner.model_runner import ModelRunner

# Tokens of the prefill steps: kernels are chosen by how many there are, and most by this much more or less.
SHORTEST, TIMES = 16, 8


def warm_up(runner: ModelRunner, config: Config, *, progress: bool = False) -> None:
    """Prefill of several sizes and decode of every batch size, on pages that no request has yet. Nothing on a CPU."""
    if runner.device.type == "cpu":
        return
    steps = list(prefill_steps(config, runner.num_pages))
    graphs = [] if runner.graphs is None else runner.graphs.usual
    with tqdm(total=len(steps) + len(graphs), desc="compiling kernels", unit=" steps", disable=not progress) as bar:
        for step in steps:
            runner.execute(step).wait()
            bar.update()
        for shape in graphs:
            assert runner.graphs is not None
            runner.graphs.capture(*shape)
            bar.update()
    runner.forward_seconds = 0.0  # of requests, as /metrics says


def prefill_steps(config: Config, num_pages: int) -> Iterator[ScheduledBatch]:
    """Prompts of 16, 128, 1024, ... tokens up to a chunk, each in one step; then a second, if there is room."""
    room = min(max(config.load.context_length - 1, 1), num_pages * PAGE_SIZE)
    chunk = min(config.scheduler.chunked_prefill_size, room)
    sizes = [size for size in (SHORTEST * TIMES**i for i in range(8)) if size < chunk]
    for size in (*sizes, chunk):
        yield _prompt(config, 0, size)
    if room > chunk:
        yield _prompt(config, chunk, min(room - chunk, chunk))


def _prompt(config: Config, start: int, num_tokens: int) -> ScheduledBatch:
    """Tokens of slot 0 after `start` others. Different ones, so that they go to different experts."""
    ids = tuple(7919 * i % config.model.vocab_size for i in range(num_tokens))
    pages = tuple(range(1, 1 + -(-(start + num_tokens) // PAGE_SIZE)))
    opened = OpenSlot(sampling=SamplingParams(temperature=0.0), pages=pages, num_prompt=start + num_tokens)
    return ScheduledBatch(0, (ScheduledRow(slot=0, start=start, token_ids=ids, open=opened),))
