"""fp8_experts of the released model, decode and prefill, a shared expert among them: our kernel for few tokens and
DeepGEMM side by side, and the parts around its products. Decode runs as a CUDA graph, as it does in a server.

python -m baleen.kernels.fp8_experts.bench_fp8_experts FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deep_gemm as library
import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, FP8_FLOPS_PER_MS, Result, correct, report, time_all
from baleen.kernels.fp8_experts import IMPLEMENTATIONS, deep_gemm, layout, reference, triton_kernel
from baleen.kernels.fp8_experts.cases import CASES
from baleen.kernels.fp8_quant import quantize_1x128

HIDDEN, WIDTH, TOP_K = 7168, 2048, 8
EXPERTS = (33, 257)
DECODE = (1, 4, 8, 16, 64, 128)
PREFILL = (256, 1024, 4096, 8192)
# Rows of a weight in a program, warps, stages of our kernel.
TILES = ((64, 4, 3), (64, 4, 5), (64, 4, 6), (128, 4, 3), (128, 4, 4), (128, 8, 4))


def main() -> None:
    names = [name for name in IMPLEMENTATIONS if name != "reference"]
    cases = [case for case in CASES if torch.bfloat16 in case.parameters]
    verdicts = correct(IMPLEMENTATIONS, cases, names)
    weights = _weights(max(EXPERTS))
    for tokens in (1, 16, 17, 128, 129, 600):
        verdicts[f"{tokens} tokens, error of the norm"] = _errors(tokens, [part[:33] for part in weights])
    results = []
    for num_experts in EXPERTS:
        part = [weight[:num_experts] for weight in weights]
        for tokens in DECODE:
            results.append(_decode(tokens, part))
            torch.cuda.empty_cache()
        for tokens in PREFILL:
            results.append(_prefill(tokens, part))
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


def _errors(tokens: int, weights: list[Tensor]) -> str:
    arguments = (*_inputs(tokens, weights[0].shape[0]), *weights, torch.bfloat16)
    torch.full((1 << 30,), 0xFF, dtype=torch.uint8, device="cuda")
    expected = reference.fp8_experts(*arguments).double()
    texts = []
    for name, function in (("chosen", deep_gemm.fp8_experts), ("triton", triton_kernel.fp8_experts)):
        error = float((function(*arguments).double() - expected).norm() / expected.norm())
        texts.append(f"{name} {error:.1e}")
    print(tokens, texts, flush=True)
    return ", ".join(texts)


def _captured(function: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _with(module: Any, settings: dict[str, Any], function: Callable[[], Any]) -> Callable[[], Any]:
    """The function under other module constants, captured under them."""
    kept = {name: getattr(module, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(module, name, value)
        return _captured(function)
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _decode(tokens: int, weights: list[Tensor]) -> Result:
    num_experts = weights[0].shape[0]
    inputs = _inputs(tokens, num_experts)
    arguments = (*inputs, *weights, torch.bfloat16)
    touched = inputs[1].unique().numel()
    floor = touched * 3 * HIDDEN * WIDTH / BYTES_PER_MS
    functions: dict[str, Callable[[], Any]] = {}

    def add(name: str, module: Any, settings: dict[str, Any], function: Callable[[], Any]) -> None:
        try:
            functions[name] = _with(module, settings, function)
        except Exception as error:  # a tile that does not fit: the others go on
            print(f"{name}: {error}"[:300], flush=True)

    add("chosen", deep_gemm, {}, lambda: deep_gemm.fp8_experts(*arguments))
    add("deep_gemm", deep_gemm, {"FEW_TOKENS": 0}, lambda: deep_gemm.fp8_experts(*arguments))
    add("joined", deep_gemm, {"FEW_TOKENS": 0, "MOST_MASKED": 0}, lambda: deep_gemm.fp8_experts(*arguments))
    add("triton", triton_kernel, {}, lambda: triton_kernel.fp8_experts(*arguments))
    parts = _parts(inputs, weights)
    for name, part in parts.items():
        add(name, deep_gemm, {}, part)
    if tokens in (1, 16) and num_experts == max(EXPERTS):
        for rows, warps, stages in TILES:
            settings = {"_ROWS": rows, "_OPTIONS": {"num_warps": warps, "num_stages": stages}}
            add(f"triton {rows, warps, stages}", triton_kernel, settings, lambda: triton_kernel.fp8_experts(*arguments))
    return time_all(Result(f"{tokens} tokens, {touched} of {num_experts} experts", floor), functions)


def _parts(inputs: tuple[Any, Tensor, Tensor], weights: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """DeepGEMM's two products on rows that already lie right, and what is around them."""
    x, ids, expert_weights = inputs
    num_experts, num_pairs = weights[0].shape[0], ids.numel()

    def lay_out() -> layout.Layout:
        if ids.shape[0] <= layout.MASKED_TOKENS:
            return layout.masked(x, ids, num_experts)
        return layout.joined(x, ids, num_experts, library.get_mk_alignment_for_contiguous_layout())

    place = lay_out()
    num_rows = place.values.shape[0]
    gated = torch.zeros(num_rows, 2 * WIDTH, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros(num_rows, WIDTH, dtype=torch.bfloat16, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.ones(num_rows // place.group, WIDTH // 128, place.group, device="cuda")
    products = torch.zeros(num_rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    expected = -(-num_pairs // num_experts)
    return {
        "layout": lay_out,
        "gate_up": lambda: deep_gemm._multiply(place, place.values, place.scale, *weights[:2], gated, expected),
        "activate": lambda: triton_kernel.activate(gated, place.rows, num_pairs, values, scale),
        "down": lambda: deep_gemm._multiply(place, values, scale, *weights[2:], products, expected),
        "sum": lambda: triton_kernel.weighted_sum(products, place.rows, expert_weights, torch.bfloat16),
    }


def _prefill(tokens: int, weights: list[Tensor]) -> Result:
    num_experts = weights[0].shape[0]
    inputs = _inputs(tokens, num_experts)
    arguments = (*inputs, *weights, torch.bfloat16)
    by_bytes = num_experts * 3 * HIDDEN * WIDTH / BYTES_PER_MS
    by_flops = 6 * inputs[1].numel() * HIDDEN * WIDTH / FP8_FLOPS_PER_MS
    functions = {"chosen": lambda: deep_gemm.fp8_experts(*arguments), **_parts(inputs, weights)}
    return time_all(Result(f"{tokens} tokens, {num_experts} experts", max(by_bytes, by_flops)), functions)


if __name__ == "__main__":
    main()
