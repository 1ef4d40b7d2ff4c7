"""index_logits, decode and prefill, and with topk the whole selection; DeepGEMM is one of the implementations.

python -m baleen.kernels.index_logits.bench_index_logits FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, FP8_FLOPS_PER_MS, Result, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.index_logits import IMPLEMENTATIONS, reference
from baleen.kernels.topk import topk

HEADS, DIM, K = 64, 128, 2048
DECODE = ((1, 131_072), (16, 16_384), (32, 32_768), (128, 8192), (64, 131_072))  # requests, context
PREFILL = ((2048, 8192), (2048, 32_768), (2048, 131_072))  # query tokens, context


def main() -> None:
    names = [name for name in available(IMPLEMENTATIONS) if name != "reference"]
    results, verdicts = [], {}
    for name in names:
        verdicts[name] = f"largest error, of the largest score: {_decode_error(name):.1e}, {_prefill_error(name):.1e}"
        print(name, verdicts[name], flush=True)
    for requests, context in DECODE:
        results += _decode(names, requests, context)
        torch.cuda.empty_cache()
    for queries, context in PREFILL:
        results += _prefill(names, queries, context)
        torch.cuda.empty_cache()
    report("index_logits", results, verdicts)


def _function(name: str, function: str) -> Callable[..., Any]:
    found = find(IMPLEMENTATIONS, name, function)
    assert found is not None
    return found


def _fp8(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)


def _pages(requests: int, context: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """q, weights, keys, scales; the page table, its pages in any order; lengths."""
    width = context // 64
    pages = torch.empty(1 + requests * width, 64 * (DIM + 4), dtype=torch.uint8, device="cuda")
    keys = pages[:, : 64 * DIM].view(torch.float8_e4m3fn).unflatten(1, (64, DIM))
    scales = pages[:, 64 * DIM :].view(torch.float32)
    for part in torch.arange(len(pages), device="cuda").split(4096):
        keys[part[0] : part[-1] + 1] = _fp8(len(part), 64, DIM)
    scales.copy_(torch.rand(scales.shape, device="cuda"))
    table = 1 + torch.randperm(requests * width, device="cuda").view(requests, width)
    weights = torch.randn(requests, HEADS, device="cuda") * (HEADS * DIM) ** -0.5
    return (_fp8(requests, HEADS, DIM), weights, keys, scales), table, torch.full((requests,), context, device="cuda")


def _decode_error(name: str) -> float:
    operands, table, lengths = _pages(5, 3008)
    lengths -= torch.tensor([0, 1, 63, 1000, 2990], device="cuda")
    torch.full((1 << 26,), 0xFF, dtype=torch.uint8, device="cuda")
    got = _function(name, "paged_index_logits")(*operands, _function(name, "plan_pages")(table, lengths))
    expected = reference.paged_index_logits(*operands, reference.plan_pages(table, lengths))
    visible = torch.arange(got.shape[1], device="cuda") < lengths[:, None]
    return float((got - expected)[visible].abs().max() / expected[visible].abs().max())


def _chunk(queries: int, context: int) -> tuple[Tensor, ...]:
    weights = torch.randn(1, queries, HEADS, device="cuda") * (HEADS * DIM) ** -0.5
    lengths = torch.arange(context - queries + 1, context + 1, device="cuda").unsqueeze(0)
    return _fp8(1, queries, HEADS, DIM), weights, _fp8(1, context, DIM), torch.rand(1, context, device="cuda"), lengths


def _prefill_error(name: str) -> float:
    operands = _chunk(203, 1033)
    torch.full((1 << 26,), 0xFF, dtype=torch.uint8, device="cuda")
    got, expected = _function(name, "index_logits")(*operands), reference.index_logits(*operands)
    visible = torch.arange(got.shape[2], device="cuda") < operands[-1][..., None]
    return float((got - expected)[visible].abs().max() / expected[visible].abs().max())


def _decode(names: list[str], requests: int, context: int) -> list[Result]:
    operands, table, lengths = _pages(requests, context)
    floor = requests * context * (DIM + 4 + 4) / BYTES_PER_MS
    functions: dict[str, Callable[[], Any]] = {}
    selections: dict[str, Callable[[], Any]] = {}
    for name in names:
        plan = _function(name, "plan_pages")(table, lengths)
        function = _function(name, "paged_index_logits")
        functions[name] = lambda function=function, plan=plan: function(*operands, plan)
        selections[name] = lambda scores=functions[name]: topk(scores(), lengths, K)
    if "triton" in functions:
        functions |= _tiles("_DECODE", functions["triton"], [(64, 4, 3), (64, 4, 6), (128, 4, 3), (128, 8, 4)])
    both = Result(f"decode with topk, {requests} x {context}", floor)
    return [
        time_all(Result(f"decode, {requests} x {context}", floor), functions),
        time_all(both, selections),
    ]


def _prefill(names: list[str], queries: int, context: int) -> list[Result]:
    operands = _chunk(queries, context)
    lengths = operands[-1]
    floor = 2 * HEADS * DIM * float(lengths.sum()) / FP8_FLOPS_PER_MS
    functions: dict[str, Callable[[], Any]] = {}
    selections: dict[str, Callable[[], Any]] = {}
    for name in names:
        function = _function(name, "index_logits")
        functions[name] = lambda function=function: function(*operands)
        selections[name] = lambda scores=functions[name]: topk(scores()[0], lengths[0], K)
    if "triton" in functions:
        functions |= _tiles(
            "_PREFILL", functions["triton"], [(128, 8, 3, 2), (128, 4, 3, 1), (256, 8, 3, 1), (256, 8, 3, 2)]
        )
    both = Result(f"prefill with topk, {queries} x {context}", floor)
    return [
        time_all(Result(f"prefill, {queries} x {context}", floor), functions),
        time_all(both, selections),
    ]


def _tiles(setting: str, function: Callable[[], Any], shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], Any]]:
    """Our Triton kernel with other tiles than it chooses: is the choice right?"""
    from baleen.kernels.index_logits import triton_kernel

    def run(tile: dict[str, int]) -> Any:
        kept = getattr(triton_kernel, setting)
        setattr(triton_kernel, setting, tile)
        try:
            return function()
        finally:
            setattr(triton_kernel, setting, kept)

    tiles = [dict(zip(("KEYS", "num_warps", "num_stages", "STEP"), shape)) for shape in shapes]
    return {f"triton {shape}": lambda tile=tile: run(tile) for shape, tile in zip(shapes, tiles)}


if __name__ == "__main__":
    main()
