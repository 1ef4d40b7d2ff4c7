"""What a GPU compiles and captures at first use, before there is a request: the first ones find it ready."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from baleen.config import PAGE_SIZE, Config
from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
from baleen.runner.decode_graphs import largest_batch, usual_shapes
from baleen.runner.model_runner import ModelRunner

SHORTEST = 16  # tokens of a prefill step; then twice as many, ...: kernels are chosen by the power of two


def warm_up(runner: ModelRunner, config: Config, *, progress: bool = False) -> None:
    """Prefill of several sizes and decode of every batch size, on pages that no request has yet. Nothing on a CPU."""
    if runner.device.type == "cpu":
        return
    steps = list(prefill_steps(config, runner.num_pages))
    graphs = decode_shapes(config)
    with tqdm(total=len(steps) + len(graphs), desc="compiling kernels", unit=" steps", disable=not progress) as bar:
        for step in steps:
            runner.execute(step).wait()
            bar.update()
        for shape in graphs:
            assert runner.graphs is not None
            runner.graphs.capture(*shape)
            bar.update()
    runner.forwards.reset()  # of requests, as /metrics says


def prefill_steps(config: Config, num_pages: int) -> Iterator[ScheduledBatch]:
    """Prompts of 16, 32, 64, ... tokens up to a chunk, each in one step; then a second, if there is room."""
    room = min(max(config.load.context_length - 1, 1), num_pages * PAGE_SIZE)
    chunk = min(config.scheduler.chunked_prefill_size, room)
    size = SHORTEST
    while size < chunk:
        yield _prompt(config, 0, size)
        size *= 2
    yield _prompt(config, 0, chunk)
    if room > chunk:
        yield _prompt(config, chunk, min(room - chunk, chunk))


def decode_shapes(config: Config) -> list[tuple[int, int]]:
    """Size and context of the decode graphs; none where there are no graphs."""
    if config.load.device == "cpu" or config.scheduler.disable_cuda_graph:
        return []
    return usual_shapes(largest_batch(config.scheduler), config.model.index_topk, config.load.context_length)


def _prompt(config: Config, start: int, num_tokens: int) -> ScheduledBatch:
    """Tokens of slot 0 after `start` others. Different ones, so that they go to different experts."""
    ids = tuple(7919 * i % config.model.vocab_size for i in range(num_tokens))
    pages = tuple(range(1, 1 + -(-(start + num_tokens) // PAGE_SIZE)))
    opened = OpenSlot(sampling=SamplingParams(temperature=0.0), pages=pages, num_prompt=start + num_tokens)
    return ScheduledBatch(0, (ScheduledRow(slot=0, start=start, token_ids=ids, open=opened),))
