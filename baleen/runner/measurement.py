"""What a benchmark needs beside a runner's steps: what the GPU did in them, and a cache filled without a prefill."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from baleen.attention.kv_pool import KVPool, PackedIndex, PackedLatent

FILL_ROWS = 1 << 16  # written at once
_FP8_SCALE = 2.0**-6  # of standard normal values: e4m3 holds up to 448


class Recorded(NamedTuple):
    """A kernel, copy or fill on the GPU, in microseconds.

    launch  what started it: one number for all kernels of a graph
    blocks  thread blocks of a kernel, 0 of a copy
    """

    name: str
    start: float
    duration: float
    launch: int
    blocks: int


def record(function: Callable[[], Any], device: torch.device) -> list[Recorded]:
    """What the device did while `function` ran, in order of start; on a CPU the outermost torch operations.

    `function` must have waited for the device before it returns.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[activity]) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return list(_recorded(events, on_gpu=on_gpu))


def _recorded(events: list[dict[str, Any]], *, on_gpu: bool) -> Iterator[Recorded]:
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    own = [event for event in events if event.get("ph") == "X" and event.get("cat") in kinds]
    end = float("-inf")
    for event in sorted(own, key=lambda event: (float(event["ts"]), -float(event["dur"]))):
        start, duration = float(event["ts"]), float(event["dur"])
        if not on_gpu and start < end:
            continue  # within the operation before it
        end = max(end, start + duration)
        more = event.get("args", {})
        yield Recorded(event["name"], start, duration, int(more.get("correlation", 0)), prod(more.get("grid", (0,))))


@torch.inference_mode()
def fill_cache(pool: KVPool, seed: int = 0) -> None:
    """Random tokens in every slot: latents and index keys as normal as norms make them, in the pool's layout."""
    for layer in range(len(pool.latent)):
        rows, keys = pool.latent[layer], pool.index[layer]
        generator = torch.Generator((rows.rows if isinstance(rows, PackedLatent) else rows).device)
        generator.manual_seed(seed + layer)
        for part in (rows.values, rows.rope) if isinstance(rows, PackedLatent) else (rows,):
            _fill(part, generator)
        for part in (keys.keys,) if isinstance(keys, PackedIndex) else (keys,):
            _fill(part, generator)
        for packed in (rows, keys):
            if not isinstance(packed, Tensor):
                packed.scales.fill_(_FP8_SCALE)


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    """Standard normal values, times 1 / _FP8_SCALE in e4m3."""
    scale = 1 / _FP8_SCALE if tensor.dtype == torch.float8_e4m3fn else 1.0
    step = max(1, FILL_ROWS * tensor.shape[-1] // tensor[0].numel())
    for part in tensor.split(step):
        values = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        part.copy_(values.normal_(generator=generator).mul_(scale).clamp_(-448, 448))
