"""fp8_experts of the released model in decode, a shared expert among them: our kernel and DeepGEMM side by side, as
CUDA graphs, as in a server.

python -m baleen.kernels.fp8_experts.bench_fp8_experts FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, report, time_all
from baleen.kernels.fp8_experts import deep_gemm, reference, triton_kernel
from baleen.kernels.fp8_quant import quantize_1x128

HIDDEN, WIDTH, TOP_K = 7168, 2048, 8
# Experts, the shared one among them: tokens.
SHAPES = {257: (16, 64, 128), 33: (16, 32, 64, 128)}
# Rows of a weight in a program, stages of our kernel; the first is what it has.
TILES = ((64, 4), (128, 3))
TILED = (257, (64, 128))


def main() -> None:
    verdicts: dict[str, str] = {}
    results = []
    weights = _weights(max(SHAPES))
    for num_experts, batches in SHAPES.items():
        part = [weight[:num_experts] for weight in weights]
        for tokens in batches:
            results.append(_decode(tokens, part, verdicts))
            torch.cuda.empty_cache()
    report("fp8_experts", results, verdicts)


def _weights(num_experts: int) -> list[Tensor]:
    """gate_up, its scales, down, its scales."""
    out = []
    for rows, columns in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        values = torch.empty(num_experts, rows, columns, dtype=torch.float8_e4m3fn, device="cuda")
        for expert in values:
            expert.copy_(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda").mul_(32))
        exponents = torch.randint(-12, -9, (num_experts, rows // 128, columns // 128), device="cuda")
        out += [values, torch.exp2(exponents.float())]
    return out


def _inputs(tokens: int, num_experts: int) -> tuple[Any, Tensor, Tensor]:
    """The last expert has every token."""
    x = quantize_1x128(torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda"))
    ids = torch.rand(tokens, num_experts - 1, device="cuda").topk(TOP_K).indices
    shared = torch.full((tokens, 1), num_experts - 1, device="cuda")
    return x, torch.cat((ids, shared), 1), torch.rand(tokens, TOP_K + 1, device="cuda")


def _captured(function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """The graph's replay, and where it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


def _with(module: Any, settings: dict[str, Any], function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """The function under other module constants, captured under them."""
    kept = {name: getattr(module, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(module, name, value)
        return _captured(function)
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _decode(tokens: int, weights: list[Tensor], verdicts: dict[str, str]) -> Result:
    num_experts = weights[0].shape[0]
    inputs = _inputs(tokens, num_experts)
    arguments = (*inputs, *weights, torch.bfloat16)
    touched = inputs[1].unique().numel()
    shape = f"{tokens} tokens, {touched} of {num_experts} experts"
    functions: dict[str, Callable[[], Any]] = {}
    errors = []
    expected = reference.fp8_experts(*arguments).double()

    def add(name: str, module: Any, settings: dict[str, Any], function: Callable[[], Tensor]) -> None:
        try:
            replay, out = _with(module, settings, function)
            replay()
            errors.append(f"{name} {float((out.double() - expected).norm() / expected.norm()):.1e}")
            functions[name] = replay
        except Exception as error:  # a tile that does not fit: the others go on
            print(f"{name}: {error}"[:300], flush=True)

    settings = {"FEW_TOKENS": 0, "FEW_ROWS": 0}
    add("deep_gemm", deep_gemm, settings, lambda: deep_gemm.fp8_experts(*arguments))
    tiles = TILES if num_experts == TILED[0] and tokens in TILED[1] else TILES[:1]
    for rows, stages in tiles:
        settings = {"_ROWS": rows, "_OPTIONS": {"num_warps": 4, "num_stages": stages}}
        add(f"triton {rows}", triton_kernel, settings, lambda: triton_kernel.fp8_experts(*arguments))
    verdicts[f"{shape}, error of the norm"] = ", ".join(errors)
    print(f"{shape}: errors {errors}", flush=True)
    return time_all(Result(shape, touched * 3 * HIDDEN * WIDTH / BYTES_PER_MS), functions)


if __name__ == "__main__":
    main()
