"""Every op in the released model's shapes: implementations against the reference, both on the GPU, with times.

Inputs that a case list made for a CPU is too small for. Tolerances are those of the tests on a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from gpu.stages import Report, table

HEADS, NOPE, ROPE, LATENT, VALUE = 128, 128, 64, 512, 128
HIDDEN, Q_LORA, INDEX_HEADS, INDEX_DIM, TOPK = 7168, 1536, 64, 128, 2048
EXPERTS, SHARE, INNER = 256, 32, 2048  # SHARE: experts of one GPU of eight
LINEARS = ((2240, HIDDEN), (32768, Q_LORA), (HIDDEN, 16384), (36864, HIDDEN), (HIDDEN, 18432), (4096, HIDDEN))
STORES = ("store_keys", "rope_queries")
MILLISECONDS = 15.0  # of timing for each

# op, function, what to show, arguments
Input = tuple[str, str, str, tuple[Any, ...]]


class Maker:
    """Random tensors on the device."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: str = "bfloat16") -> Any:
        kind = getattr(self.torch, dtype)
        return self.torch.randn(shape, generator=self.generator, device=self.device, dtype=kind)

    def uniform(self, *shape: int) -> Any:
        return self.torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Any:
        return self.torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def fp8(self, *shape: int) -> Any:
        return self.normal(*shape).mul_(32).to(self.torch.float8_e4m3fn)

    def blocks(self, *shape: int) -> tuple[Any, Any]:
        scale = self.torch.full((*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128), 2.0**-11, device=self.device)
        return self.fp8(*shape), scale

    def angles(self, tokens: int) -> tuple[Any, Any]:
        angles = self.uniform(tokens, ROPE // 2) * 6
        return angles.cos(), angles.sin()

    def quantized(self, tokens: int, width: int) -> Any:
        from baleen.kernels.fp8_quant import quantize_1x128

        return quantize_1x128(self.normal(tokens, width))


def products(m: Maker, sizes: tuple[int, ...]) -> Iterator[Input]:
    bf16 = m.torch.bfloat16
    for n, k in LINEARS:
        weight = m.blocks(n, k)
        for tokens in sizes:
            yield "fp8_gemm", "fp8_gemm", f"{tokens} x {n} x {k}", (m.quantized(tokens, k), *weight, bf16)
    experts = (*m.blocks(SHARE + 1, 2 * INNER, HIDDEN), *m.blocks(SHARE + 1, HIDDEN, INNER))
    for tokens in sizes:
        ids = m.uniform(tokens, SHARE).topk(8).indices
        ids = m.torch.cat([ids, m.torch.full_like(ids[:, :1], SHARE)], dim=1)
        weights = m.uniform(tokens, 9)
        label = f"{tokens} tokens, {SHARE} + 1 experts"
        yield "fp8_experts", "fp8_experts", label, (m.quantized(tokens, HIDDEN), ids, weights, *experts, bf16)


def elementwise(m: Maker, sizes: tuple[int, ...]) -> Iterator[Input]:
    for tokens in sizes:
        label = f"{tokens} tokens"
        x, residual, weight = m.normal(tokens, HIDDEN), m.normal(tokens, HIDDEN), 1 + m.normal(HIDDEN, dtype="float32")
        yield "rms_norm", "add_rms_norm_quant", label, (x, residual, weight, 1e-6)
        wide = m.normal(tokens, 2240)
        yield "rms_norm", "rms_norm_quant", label, (wide[:, :Q_LORA], weight[:Q_LORA], 1e-6)
        yield "grouped_gemm", "silu_and_mul_quant", label, (m.normal(tokens, 36864),)
        yield "fp8_quant", "quantize_1x128", label, (m.normal(tokens, 16384),)
        router = (m.normal(tokens, EXPERTS, dtype="float32"), m.normal(EXPERTS, dtype="float32") / 10)
        yield "moe_gate", "moe_gate", label, (*router, 8, 4, 8, 2.5, True, 1)
        yield from _mla_inputs(m, tokens, label, wide)


def _mla_inputs(m: Maker, tokens: int, label: str, wide: Any) -> Iterator[Input]:
    from baleen.attention.kv_pool import PackedIndex, PackedLatent

    cos, sin = m.angles(tokens)
    weights = (1 + m.normal(LATENT, dtype="float32"), 1e-6, 1 + m.normal(128, dtype="float32"))
    of_key = (m.normal(128, dtype="float32"), 1e-6)
    pages = -(-tokens // 64) + 1
    slots = 64 + m.torch.randperm(tokens, generator=m.generator, device=m.device)
    rows = m.torch.zeros(64 * pages, 656, dtype=m.torch.uint8, device=m.device)
    latent = PackedLatent.of(rows, LATENT)
    index = PackedIndex.of(m.torch.zeros(pages, 64 * 132, dtype=m.torch.uint8, device=m.device), INDEX_DIM)
    parts = (wide[:, 1536:2048], wide[:, 2048:2112], wide[:, 2112:])
    caches = ((latent.values, latent.scales, latent.rope), (index.keys, index.scales))
    yield "mla_inputs", "store_keys", f"{label}, fp8", (*parts, *weights, *of_key, cos, sin, slots, *caches)
    plain = (m.normal(64 * pages, LATENT + ROPE),)
    yield "mla_inputs", "store_keys", f"{label}, bf16", (*parts, *weights, *of_key, cos, sin, slots, plain, caches[1])
    q = m.normal(tokens, HEADS * (NOPE + ROPE) + INDEX_HEADS * INDEX_DIM)
    index_q = q[:, HEADS * (NOPE + ROPE) :].unflatten(1, (INDEX_HEADS, INDEX_DIM))
    gates = m.normal(tokens, INDEX_HEADS, dtype="float32")
    yield "mla_inputs", "index_queries", label, (index_q, gates, 0.01, cos, sin)
    q_pe = q[:, : HEADS * (NOPE + ROPE)].unflatten(1, (HEADS, NOPE + ROPE))[..., NOPE:]
    yield "mla_inputs", "rope_queries", label, (q_pe, cos, sin, q_pe)


def selection(m: Maker, sizes: tuple[tuple[int, int], ...]) -> Iterator[Input]:
    for rows, columns in sizes:
        logits = m.normal(rows, columns, dtype="float32")
        lengths = m.integers(1, columns + 1, rows)
        label = f"{rows} x {columns}"
        pages = m.integers(1, 5000, rows, -(-columns // 64))
        yield "topk", "topk_slots", label, (logits, lengths, TOPK, pages, 1)
        yield "topk", "topk_mask", label, (logits, lengths, TOPK)
    keys = (m.fp8(1, 8192, INDEX_DIM), m.torch.full((1, 8192), 2.0**-6, device=m.device))
    q, gates = m.fp8(1, 512, INDEX_HEADS, INDEX_DIM), m.normal(1, 512, INDEX_HEADS, dtype="float32")
    yield "index_logits", "index_logits", "512 q x 8192 k", (q, gates, *keys)


def attention(m: Maker, queries: int, context: int) -> Iterator[Input]:
    """Masked multi-head attention of a chunk at the end of a context, and the absorbed form over selected rows."""
    q, expanded = m.normal(queries, HEADS, NOPE + ROPE), m.normal(context, HEADS, NOPE + VALUE)
    k_nope, v = expanded[..., :NOPE], expanded[..., NOPE:]
    k_pe = m.normal(context, LATENT + ROPE)[:, LATENT:]
    logits = m.normal(queries, context, dtype="float32")
    from baleen.kernels.topk import topk_mask

    mask = topk_mask(logits, m.torch.arange(context - queries + 1, context + 1, device=m.device), TOPK)
    for label, bits in (("selected", mask), ("all", None)):
        arguments = (q, k_nope, k_pe, v, bits, context - queries, 0.07, TOPK)
        yield "dense_mla", "masked_mha", f"{queries} q x {context} k, {label}", arguments
    rows = m.normal(context, LATENT + ROPE)
    chosen = m.integers(0, context, 64, TOPK)
    yield "sparse_mla", "sparse_mla", "64 q", (m.normal(64, HEADS, LATENT + ROPE), rows, chosen, 0.07, LATENT)


def shapes(device: str, report: Report) -> None:
    """All of them; a table last."""
    m = Maker(device)
    small = device == "cpu"
    sizes = (1, 7) if small else (1, 16, 128, 2048)
    groups = [
        elementwise(m, sizes),
        selection(m, ((2, 3000),) if small else ((1, 8192), (64, 8192), (16, 131072), (512, 32768))),
        attention(m, *((20, 100) if small else (1024, 4096))),
        products(m, sizes),
    ]
    rows: list[list[Any]] = []
    for inputs in groups[: 3 if small else 4]:
        try:
            for op, function, label, arguments in inputs:
                rows += _compare(report, op, function, label, arguments, device)
        except Exception:  # the other groups go on
            report.failed += 1
            report.add("group", error=traceback.format_exc()[-1500:])
    print(table(rows, ["op", "implementation", "shape", "error", "ms"]))


def _compare(report: Report, op: str, function: str, label: str, arguments: Any, device: str) -> list[list[Any]]:
    from baleen.kernels.dispatch import available, find

    listed = import_module(f"baleen.kernels.{op}").IMPLEMENTATIONS
    reference = find(listed, "reference", function)
    assert reference is not None
    own = fresh(arguments) if function in STORES else arguments
    expected = (reference(*own), own if function in STORES else None)
    rows: list[list[Any]] = []
    for name in listed:
        if name == "reference" and device != "cpu":
            continue

        def check(name: str = name) -> dict[str, Any]:
            run = find(listed, name, function) if available({name: listed[name]}) else None
            if run is None:
                return {"lacks": True}
            given = fresh(arguments) if function in STORES else arguments
            error = worst(op, (run(*given), given if function in STORES else None), expected)
            return {"error": error, "ms": milliseconds(lambda: run(*given)) if device == "cuda" else 0.0}

        values = report.attempt(f"{function}.{name} {label}", check)
        if "lacks" not in values:
            error = values["error"] if values.get("ok", True) else "FAILED"
            rows.append([function, name, label, error, values.get("ms")])
    return rows


def worst(op: str, got: Any, want: Any) -> float:
    """The largest difference of any output; AssertionError if one is too large."""
    import torch
    from torch.utils._pytree import tree_leaves

    from baleen.kernels.test_gpu import difference

    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return max(difference(op, a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def milliseconds(function: Callable[[], Any]) -> float:
    from baleen.kernels.bench_timing import median_ms

    return median_ms(function, MILLISECONDS)


def fresh(arguments: Any) -> Any:
    """Copies with the same strides; views of one buffer are views of one again."""
    import torch
    from torch.utils._pytree import tree_map

    buffers: dict[int, Any] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in buffers:
            whole = torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(storage)
            buffers[storage.data_ptr()] = whole.clone().untyped_storage()
        moved = buffers[storage.data_ptr()]
        empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return empty.set_(moved, leaf.storage_offset(), leaf.shape, leaf.stride())

    return tree_map(copy, arguments)
