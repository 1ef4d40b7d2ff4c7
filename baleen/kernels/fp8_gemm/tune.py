"""Measures every implementation of the FP8 product on this GPU, and writes which is the fastest for each shape.

Times are of products inside a CUDA graph, as decode runs them, over several weights that no cache holds all of.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baleen.kernels.fp8_gemm import reference, tuned
from baleen.kernels.fp8_gemm.tuned import Choice
from baleen.kernels.fp8_quant import Quantized, empty_scale

# DeepSeek-V3.2's linear layers: of q_a, kv_a and the indexer's wk; q_b and wq_b; o; gate and up, then down of the dense
# layers; those of the shared expert.
SHAPES = ((2240, 7168), (32768, 1536), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)

BYTES_PER_MS = 4.26e9  # large copies on one H200
FLOPS_PER_MS = 1.232e12  # DeepGEMM's largest products there
TOLERANCE = 0.02  # of the largest result; FP8 sums on Hopper and the rounding to bfloat16 make 0.006
_ROTATED_BYTES = 192 << 20  # three times an H200's L2 cache
_PROCESSORS = 132
_SHARED_BYTES = 232_448 - 1024  # of a multiprocessor, less what each program's runtime takes

# Kernels of ours worth trying: block_m, block_n, stages, warps, by the most rows of x.
_KERNELS = {
    16: ((16, 64, 4, 4), (16, 64, 6, 4), (16, 128, 4, 4), (16, 128, 6, 4)),
    32: ((32, 64, 4, 4), (32, 128, 4, 4)),
    64: ((64, 64, 4, 4), (64, 128, 4, 8), (64, 256, 4, 8)),
    128: ((64, 128, 4, 8), (128, 64, 4, 4), (128, 128, 5, 8)),
}


class Measured(NamedTuple):
    """One implementation at one shape: ms, or why there is none."""

    choice: Choice
    ms: float | None
    failure: str = ""


def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    out_path: Path | None = None,
    tokens: Sequence[int] = TOKENS,
    report: Callable[[int, int, int, list[Measured]], None] | None = None,
) -> dict[str, Any]:
    """Measures all choices for weights [N, K] in `shapes` and rows of x in `tokens`: on an H200 in about a minute.

    shapes    (N, K); K a multiple of 128
    out_path  where the table goes, for `tuned.use_table`; None: nowhere
    tokens    powers of two; a choice holds for the numbers above the one before
    report    called with (M, N, K, all that was measured) as it goes
    returns   the table as in the file: {"device", "torch", "shapes": {"NxK": {"M": {"use", "config", "ms", "floor"}}}}
    Raises:   RuntimeError without a CUDA device; ValueError for tokens that are no powers of two.
    """
    if any(count < 1 or count & (count - 1) for count in tokens):
        raise ValueError(f"fp8_gemm: rows to tune for must be powers of two, not {list(tokens)}")
    table: dict[str, Any] = {"device": _device_name(), "torch": torch.__version__, "shapes": {}}
    _compile(shapes, tokens)
    for num_rows, num_cols in shapes:
        entries = table["shapes"][f"{num_rows}x{num_cols}"] = {}
        operands = _Operands(num_rows, num_cols, max(tokens))
        for count in tokens:
            results = [_measure(choice, operands, count) for choice in candidates(count, num_rows, num_cols)]
            if report is not None:
                report(count, num_rows, num_cols, results)
            timed = [(result.ms, result.choice) for result in results if result.ms is not None]
            if timed:
                ms, choice = min(timed)
                entry: dict[str, Any] = {"use": choice.use}
                if choice.config is not None:
                    entry["config"] = list(choice.config)
                entries[str(count)] = entry | {
                    "ms": round(ms, 5),
                    "floor": round(floor_ms(count, num_rows, num_cols), 5),
                }
        del operands
        _empty_cache()
    if out_path is not None:
        out_path.write_text(dump(table))
    return table


def dump(table: dict[str, Any]) -> str:
    """As JSON, a line for each number of rows."""
    head = "".join(f"{json.dumps(name)}: {json.dumps(table[name])},\n" for name in ("device", "torch"))
    shapes = [
        f"{json.dumps(shape)}: {{\n"
        + ",\n".join(f"  {json.dumps(count)}: {json.dumps(entry)}" for count, entry in entries.items())
        + "\n}"
        for shape, entries in table["shapes"].items()
    ]
    return "{\n" + head + '"shapes": {\n' + ",\n".join(shapes) + "\n}\n}\n"


def floor_ms(num_tokens: int, num_rows: int, num_cols: int) -> float:
    """The longer of reading and writing everything once and of the arithmetic, at the rates of one H200."""
    moved = num_rows * num_cols + num_tokens * (num_cols + 2 * num_rows)
    return max(moved / BYTES_PER_MS, 2 * num_tokens * num_rows * num_cols / FLOPS_PER_MS)


def candidates(num_tokens: int, num_rows: int, num_cols: int) -> Iterator[Choice]:
    """All that can be loaded here and takes the shape; our own kernel in several configurations."""
    for name, module in tuned.modules().items():
        if not module.takes(num_tokens, num_rows, num_cols):
            continue
        if name == "triton":
            yield from (Choice(name, config) for config in configs(num_tokens, num_rows, num_cols))
        else:
            yield Choice(name)


def configs(num_tokens: int, num_rows: int, num_cols: int) -> list[tuple[int, ...]]:
    """Fields of triton_kernel.Config: programs for the whole GPU at once, for half of that, and one or two a tile."""
    found: dict[tuple[int, ...], None] = {}
    blocks = num_cols // 128
    for block_m, block_n, stages, warps in _KERNELS[min(max(num_tokens, 16), 128)]:
        by_memory = _SHARED_BYTES // (stages * (block_m + block_n) * 128 + 1536)
        by_registers = {16: 5, 32: 4}.get(block_m, 8 // warps + 1)
        together = _PROCESSORS * min(by_memory, by_registers)
        tiles = -(-num_rows // block_n) * -(-num_tokens // block_m)
        for splits in (together // tiles, together // 2 // tiles, 1, 2 if tiles > together else 1):
            splits = max(min(splits, blocks // 2), 1)
            # Few programs, or such as read more than a MiB of the weight, leave most of the GPU idle.
            if tiles * splits * 2 >= _PROCESSORS and num_cols * block_n // splits <= 5 << 18:
                found[(block_m, block_n, splits, stages, warps, 0)] = None
                if block_m == 16 and stages == 4:
                    found[(block_m, block_n, splits, stages, warps, 1)] = None
    return [*found]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _device_name() -> str:
    return torch.cuda.get_device_name()


def _empty_cache() -> None:
    torch.cuda.empty_cache()


class _Operands:
    """Weights that no cache holds together, and rows of x."""

    def __init__(self, num_rows: int, num_cols: int, most_tokens: int) -> None:
        generator, device = torch.Generator(_device()).manual_seed(0), _device()

        def fp8(rows: int, scale: float) -> Tensor:
            values = torch.randn(rows, num_cols, generator=generator, device=device, dtype=torch.bfloat16)
            return values.mul_(scale).to(torch.float8_e4m3fn)

        count = min(max(-(-_ROTATED_BYTES // (num_rows * num_cols)), 2), 16)
        blocks = num_cols // 128
        self.weights = [fp8(num_rows, 32.0) for _ in range(count)]
        self.scale = torch.rand(-(-num_rows // 128), blocks, generator=generator, device=device).add_(0.5).mul_(2**-11)
        self.values = fp8(most_tokens, 32.0)
        self.x_scale = torch.rand(most_tokens, blocks, generator=generator, device=device).add_(0.5).mul_(2**-5)
        checked = Quantized(self.values[:64], self.x_scale[:64])
        self.expected = reference.fp8_gemm(checked, self.weights[0], self.scale, torch.float32)

    def x(self, num_tokens: int) -> Quantized:
        scale = empty_scale(num_tokens, self.x_scale.shape[1], self.x_scale.device)
        return Quantized(self.values[:num_tokens], scale.copy_(self.x_scale[:num_tokens]))

    def error(self, result: Tensor) -> float:
        """Of the first rows, relative to the largest of them; a NaN is infinite."""
        expected = self.expected[: result.shape[0]]
        error = float((result[: len(expected)].float() - expected).abs().max() / expected.abs().max())
        return error if error == error else torch.inf


def _measure(choice: Choice, operands: _Operands, num_tokens: int) -> Measured:
    run, x = tuned.bind(choice), operands.x(num_tokens)

    def product(index: int) -> Tensor:
        weight = operands.weights[index % len(operands.weights)]
        return run(x, weight, operands.scale, torch.bfloat16)

    try:
        error = operands.error(product(0))
        if error > TOLERANCE:
            return Measured(choice, None, f"wrong by {error:.3g} of the largest result")
        length = min(max(round(3 / floor_ms(num_tokens, *operands.weights[0].shape)), 2), 20)
        return Measured(choice, _milliseconds(product, length))
    except Exception as failure:  # a library or a compiler of any kind: the others go on
        return Measured(choice, None, f"{type(failure).__name__}: {failure}"[:200])


def _milliseconds(product: Callable[[int], Tensor], length: int) -> float:
    """GPU time of one of `length` products of a graph: the median of several replays."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        # Libraries keep a workspace for each stream: not one of the graph's memory.
        product(1)
        torch.cuda.synchronize()
        # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time.
        graph.capture_begin()
        try:
            for index in range(length):
                product(index)
        finally:
            graph.capture_end()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(7)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events)) / length


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _compile(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> None:
    """Has our kernels compiled, several at a time; what fails here fails again where it is reported."""
    module = tuned.modules().get("triton")
    few = [count for count in tokens if count <= 128]
    if module is None or not few or not shapes:
        return
    num_cols = 128 * 64
    chosen = {config for count in few for shape in shapes for config in _one_each(configs(count, *shape), module)}
    rows = torch.zeros(256, num_cols, dtype=torch.uint8, device=_device()).view(torch.float8_e4m3fn)
    scale = torch.zeros(2, num_cols // 128, device=_device())

    def run(config: tuple[int, ...]) -> None:
        with suppress(Exception), torch.cuda.device(rows.device):
            x = Quantized(rows[: config[0]], empty_scale(config[0], scale.shape[1], scale.device).zero_())
            module.fp8_gemm(x, rows, scale, torch.bfloat16, module.Config(*config))

    first, *others = sorted(chosen)
    run(first)  # what Triton sets up once
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, others))
    torch.cuda.synchronize()


def _one_each(found: Iterable[tuple[int, ...]], module: Any) -> Iterator[tuple[int, ...]]:
    """One configuration for each kernel: the number of splits is no part of it."""
    for config in found:
        yield tuple(module.Config(*config)._replace(splits=2))


if __name__ == "__main__":
    tune(out_path=Path("tuned.json"))
