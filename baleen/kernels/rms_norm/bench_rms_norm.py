"""What stands between the GEMMs of a layer: norms, SwiGLU and quantisation, in decode and in prefill.

python -m baleen.kernels.rms_norm.bench_rms_norm FOLDER

Floors are bytes. "graph" is a call inside a CUDA graph of many, its inputs in the L2 cache, as decode runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels import fp8_quant, grouped_gemm, rms_norm
from baleen.kernels.bench_timing import BYTES_PER_MS, Result, correct, median_ms, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.fp8_quant.cases import CASES as QUANT_CASES
from baleen.kernels.grouped_gemm.cases import CASES as SWIGLU_CASES
from baleen.kernels.rms_norm.cases import CASES as NORM_CASES
from baleen.kernels.rms_norm.cases import EPS

ROWS = (1, 16, 64, 128, 4096, 8192)
GRAPH_ROWS = 128  # and fewer are timed in a graph too
CALLS = 50  # of a graph
NORM_VALUES = (8, 16, 32, 64)  # a thread
TILES = ((2, 1), (4, 2), (8, 4), (16, 4), (32, 4), (32, 8))  # blocks, warps
# What the kernels are called with, and bytes a value of x: read and written, scales left out.
FUNCTIONS = (
    ("rms_norm", rms_norm, 4.0),
    ("rms_norm_quant", rms_norm, 3.0),
    ("add_rms_norm", rms_norm, 8.0),
    ("add_rms_norm_quant", rms_norm, 9.0),
    ("quantize_1x128", fp8_quant, 3.0),
    ("silu_and_mul", grouped_gemm, 3.0),
    ("silu_and_mul_quant", grouped_gemm, 2.5),
)


def main() -> None:
    verdicts = {}
    for op, cases in ((rms_norm, NORM_CASES), (fp8_quant, QUANT_CASES), (grouped_gemm, SWIGLU_CASES)):
        names = [name for name in available(op.IMPLEMENTATIONS) if name != "reference"]
        found = correct(op.IMPLEMENTATIONS, cases, names)
        verdicts |= {f"{op.__name__.split('.')[-1]} {name}": verdict for name, verdict in found.items()}
    results = []
    for rows in ROWS:
        results += [_bench(function, op, traffic, rows, 7168) for function, op, traffic in FUNCTIONS[:4]]
        results.append(_bench(*FUNCTIONS[1], rows, 1536))
        results.append(_bench(*FUNCTIONS[4], rows, 16384))
        results += [_bench(*FUNCTIONS[6], rows, dim) for dim in (2 * 2048, 2 * 18432)]
        torch.cuda.empty_cache()
    # The routed experts' rows: eight a token.
    results += [_bench(function, op, traffic, 8 * 4096, 2 * 2048) for function, op, traffic in FUNCTIONS[5:]]
    report("rms_norm", results, verdicts)


def _bench(function: str, op: ModuleType, traffic: float, rows: int, dim: int) -> Result:
    arguments = _arguments(function, rows, dim)
    functions: dict[str, Callable[[], Any]] = {}
    for name in available(op.IMPLEMENTATIONS):
        found = find(op.IMPLEMENTATIONS, name, function)
        assert found is not None
        functions[name] = lambda found=found: found(*arguments)
    if function == "rms_norm":
        x, weight, eps = arguments
        narrow = weight.to(x.dtype)
        functions["torch"] = lambda: F.rms_norm(x, (dim,), narrow, eps)
    result = Result(f"{function} {rows} x {dim}", traffic * rows * dim / BYTES_PER_MS)
    if "triton" in functions:
        if rows <= GRAPH_ROWS:
            result.ms["graph"] = _in_a_graph(functions["triton"])
        functions |= _others(function, op, functions["triton"], rows, dim)
    return time_all(result, functions)


def _arguments(function: str, rows: int, dim: int) -> tuple[Any, ...]:
    x = torch.randn(rows, dim, device="cuda").bfloat16()
    weight = torch.rand(dim, device="cuda") + 0.5
    if "rms" not in function:
        return (x,)
    return (x, x.flip(0), weight, EPS) if function.startswith("add") else (x, weight, EPS)


def _in_a_graph(function: Callable[[], Any]) -> float:
    """ms of a call."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept: list[Tensor] = [function() for _ in range(CALLS)]
    time = median_ms(graph.replay) / CALLS
    del kept
    return time


def _others(function: str, op: ModuleType, run: Callable[[], Any], rows: int, dim: int) -> dict[str, Callable[[], Any]]:
    """The kernels with other tiles than they choose: is the choice right?"""
    from baleen.kernels.fp8_quant import triton_kernel as quant_kernel
    from baleen.kernels.grouped_gemm import triton_kernel as swiglu_kernel
    from baleen.kernels.rms_norm import triton_kernel as norm_kernel

    if rows not in (1, 64, 4096):
        return {}
    if op is rms_norm:
        blocks = norm_kernel.tile_of(rows, dim)["BLOCKS"]
        warps = sorted({min(max(blocks * 4 // values, 1), 32) for values in NORM_VALUES})
        tiles: Sequence[Any] = [{"BLOCKS": blocks, "num_warps": count} for count in warps]
        labels = [f"{count} warps" for count in warps]
        module: ModuleType = norm_kernel
    else:
        tiles, labels = TILES, [f"{blocks} blocks, {warps} warps" for blocks, warps in TILES]
        module = quant_kernel if op is fp8_quant else swiglu_kernel
    return {label: lambda tile=tile: _with_tile(module, tile, run) for label, tile in zip(labels, tiles)}


def _with_tile(module: ModuleType, tile: Any, run: Callable[[], Any]) -> Any:
    kept = module.tile_of
    setattr(module, "tile_of", lambda *_: tile)  # noqa: B010
    try:
        return run()
    finally:
        setattr(module, "tile_of", kept)  # noqa: B010


if __name__ == "__main__":
    main()
