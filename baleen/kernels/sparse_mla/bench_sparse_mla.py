"""Sparse MLA with 128 heads over 2048 selected rows, prefill and decode, beside FlashMLA where that is installed.

python -m baleen.kernels.sparse_mla.bench_sparse_mla FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, correct, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.kv_store import gather_latent_bf16
from baleen.kernels.kv_store.cases import latent_views
from baleen.kernels.sparse_mla import IMPLEMENTATIONS, reference
from baleen.kernels.sparse_mla.cases import CASES

HEADS, LATENT, ROPE, K, SCALE = 128, 512, 64, 2048, 0.1
BF16_FLOPS_PER_MS = 0.686e12
PREFILL = ((4096, 8192), (4096, 131_072))  # query tokens, context
DECODE = (1, 4, 16, 32, 64, 96, 128, 256)  # requests, of 8192 tokens each
OTHER_HEADS = ((8, 1), (8, 64), (64, 64))  # heads, requests
Run = Callable[[], Any]


def main() -> None:
    names = [name for name in available(IMPLEMENTATIONS) if name != "reference" and _compiles(name)]
    verdicts = correct(IMPLEMENTATIONS, CASES, names)
    for name in names:
        errors = [_error(name, tokens) for tokens in (1, 16, 100)]
        verdicts[f"{name} at full size"] = f"error of bf16 and fp8 rows, of the result: {errors}"
        print(verdicts[f"{name} at full size"], flush=True)
    results = [_prefill(names, queries, context) for queries, context in PREFILL]
    results += [_decode(names, requests, HEADS) for requests in DECODE]
    results += [_decode(names, requests, heads) for heads, requests in OTHER_HEADS]
    report("sparse_mla", results, verdicts)


def _function(name: str, function: str) -> Callable[..., Any]:
    found = find(IMPLEMENTATIONS, name, function)
    assert found is not None
    return found


def _compiles(name: str) -> bool:
    try:
        _error(name, 1)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}"[:2000], flush=True)
        return False
    return True


def _inputs(tokens: int, heads: int, context: int, shared: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """q, bfloat16 rows, FP8 rows, int32 indices; a context for all tokens, or one for each."""
    slots = context if shared else tokens * context
    rows = torch.empty(slots, 656, dtype=torch.uint8, device="cuda")
    packed = latent_views(rows, LATENT, ROPE)
    for part in torch.arange(slots, device="cuda").split(1 << 16):
        own = slice(int(part[0]), int(part[-1]) + 1)
        packed[0][own] = torch.randn(len(part), LATENT, device="cuda").to(torch.float8_e4m3fn)
        packed[2][own] = torch.randn(len(part), ROPE, device="cuda").bfloat16()
    packed[1].copy_(torch.exp2(torch.randint(-2, 1, packed[1].shape, device="cuda").float()))
    kv = gather_latent_bf16(*packed, torch.arange(slots, device="cuda"))
    q = torch.randn(tokens, heads, LATENT + ROPE, device="cuda").bfloat16()
    starts = torch.zeros(tokens) if shared else torch.arange(tokens) * context
    chosen = torch.stack([torch.randperm(context, device="cuda")[:K] for _ in range(tokens)])
    return q, kv, packed, (chosen + starts[:, None].to("cuda")).int()


def _error(name: str, tokens: int) -> list[str]:
    q, kv, packed, indices = _inputs(tokens, HEADS, 4096, shared=True)
    indices[:, ::7] = -1
    torch.full((1 << 26,), 0xFF, dtype=torch.uint8, device="cuda")
    want = reference.sparse_mla(q.float(), kv.float(), indices.long(), SCALE, LATENT)
    outs = (
        _function(name, "sparse_mla")(q, kv, indices, SCALE, LATENT),
        _function(name, "sparse_mla_fp8")(q, *packed, indices, SCALE),
    )
    return [f"{float((out.float() - want).norm() / want.norm()):.1e}" for out in outs]


def _floor_ms(tokens: int, heads: int, row_bytes: int, rows: int) -> float:
    flops = 2 * tokens * heads * K * (2 * LATENT + ROPE) / BF16_FLOPS_PER_MS
    return max(flops, (rows * row_bytes + tokens * heads * 2 * (2 * LATENT + ROPE)) / BYTES_PER_MS)


def _prefill(names: list[str], queries: int, context: int) -> Result:
    q, kv, packed, indices = _inputs(queries, HEADS, context, shared=True)
    functions: dict[str, Run] = {}
    try:
        from flash_mla import flash_mla_sparse_fwd

        options = {"use_legacy": True, "return_log2_lse": False}
        arguments = (q, kv.unsqueeze(1), indices.unsqueeze(1), SCALE, LATENT)
        functions["flash_mla bf16"] = lambda: flash_mla_sparse_fwd(*arguments, **options)
    except ImportError as error:
        print(error)
    for name in names:
        bf16, fp8 = _function(name, "sparse_mla"), _function(name, "sparse_mla_fp8")
        functions[f"{name} bf16"] = lambda bf16=bf16: bf16(q, kv, indices, SCALE, LATENT)
        functions[f"{name} fp8"] = lambda fp8=fp8: fp8(q, *packed, indices, SCALE)
    if "hopper bf16" in functions:
        functions["hopper bf16, rope read"] = lambda: _with(
            "_BF16_OPTIONS", {"HOLD_ROPE": False}, functions["hopper bf16"]
        )
    functions["rows to bf16"] = lambda: gather_latent_bf16(*packed, torch.arange(context, device="cuda"))
    floor = _floor_ms(queries, HEADS, 1152, context)
    return time_all(Result(f"prefill, {queries} queries, {context} rows", floor), functions)


def _decode(names: list[str], requests: int, heads: int) -> Result:
    """Replays of CUDA graphs: what a call costs beside its launches."""
    q, kv, packed, indices = _inputs(requests, heads, 8192, shared=False)
    functions: dict[str, Run] = {}
    try:
        functions["flash_mla fp8"] = _flash_mla_fp8(q, packed[0], indices)
    except ImportError as error:
        print(error)
    for name in names:
        bf16, fp8 = _function(name, "sparse_mla"), _function(name, "sparse_mla_fp8")
        functions[f"{name} fp8"] = lambda fp8=fp8: fp8(q, *packed, indices, SCALE)
        functions[f"{name} bf16"] = lambda bf16=bf16: bf16(q, kv, indices, SCALE, LATENT)
    if "hopper fp8" in functions:
        for parts in (1, 2, 4, 8, 16, 32):
            sizes = (parts, K // parts)
            functions[f"hopper fp8, {parts} parts"] = lambda sizes=sizes: _with(
                "shares", lambda *arguments: sizes, functions["hopper fp8"]
            )
    floor = _floor_ms(requests, heads, 656, requests * K)
    return time_all(Result(f"decode, {requests} requests, {heads} heads", floor), _graphs(functions))


def _flash_mla_fp8(q: Tensor, values: Tensor, indices: Tensor) -> Run:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    if q.shape[1] < 64:
        raise ImportError("flash_mla takes 64 or 128 heads")
    slots = values.shape[0]
    cache = values.as_strided((slots // 64, 64, 1, 656), (64 * 656, 656, 656, 1))
    schedule = get_mla_metadata()[0]
    return lambda: flash_mla_with_kvcache(
        q.unsqueeze(1),
        cache,
        None,
        None,
        LATENT,
        schedule,
        softmax_scale=SCALE,
        is_fp8_kvcache=True,
        indices=indices.unsqueeze(1),
        use_legacy=True,
    )


def _graphs(functions: dict[str, Run]) -> dict[str, Run]:
    replays: dict[str, Run] = {}
    for name, function in functions.items():
        try:
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            replays[name] = graph.replay
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
    return replays


def _with(setting: str, value: Any, function: Run) -> Any:
    """A call of our Hopper kernel with another choice than its own: is that right?"""
    from baleen.kernels.sparse_mla import hopper

    kept = getattr(hopper, setting)
    setattr(hopper, setting, value)
    try:
        return function()
    finally:
        setattr(hopper, setting, kept)


if __name__ == "__main__":
    main()
