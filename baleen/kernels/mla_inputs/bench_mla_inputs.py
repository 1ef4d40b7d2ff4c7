"""store_keys, index_queries and rope_queries at a step's token counts, and reads of a context from the FP8 cache.

python -m baleen.kernels.mla_inputs.bench_mla_inputs FOLDER
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from baleen.kernels import kv_store
from baleen.kernels.bench_timing import BYTES_PER_MS, Result, correct, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.kv_store.cases import CASES as KV_CASES
from baleen.kernels.kv_store.cases import index_views, latent_views
from baleen.kernels.mla_inputs import IMPLEMENTATIONS
from baleen.kernels.mla_inputs.cases import CASES, check_rounded

TOKENS = (1, 16, 64, 128, 512, 4096, 16_384)
CONTEXTS = (4096, 32_768, 131_072)
PAGES = 2100
HEADS, INDEX_HEADS = 128, 64

# Other tiles than the chosen ones, by module attribute: is the choice right?
TILES: dict[str, list[dict[str, int]]] = {
    "_KEYS_MANY": [{"TOKENS": 1, "num_warps": 4}, {"TOKENS": 2, "num_warps": 4}, {"TOKENS": 8, "num_warps": 4}],
    "_QUERIES": [{"HEADS": 32, "num_warps": 2}, {"HEADS": 64, "num_warps": 2}, {"HEADS": 64, "num_warps": 8}],
    "_ROPE": [{"HEADS": 16, "num_warps": 4}, {"HEADS": 32, "num_warps": 4}, {"HEADS": 128, "num_warps": 4}],
    "_ROWS": [{"ROWS": 4, "num_warps": 4}, {"ROWS": 16, "num_warps": 4}, {"ROWS": 16, "num_warps": 8}],
}


def main() -> None:
    verdicts = {}
    names = [name for name in available(IMPLEMENTATIONS) if name != "reference"]
    for name in names:
        verdicts[name] = _correct(name)
        print(name, verdicts[name], flush=True)
    reads = [case for case in KV_CASES if case.function.startswith("gather")]
    kv_names = [name for name in available(kv_store.IMPLEMENTATIONS) if name != "reference"]
    verdicts |= {f"kv_store {name}": text for name, text in correct(kv_store.IMPLEMENTATIONS, reads, kv_names).items()}
    results = []
    for tokens in TOKENS:
        results += list(_step(tokens))
        torch.cuda.empty_cache()
    for context in CONTEXTS:
        results += list(_reads(context))
        torch.cuda.empty_cache()
    report("mla_inputs", results, verdicts)


def _correct(name: str) -> str:
    failures = []
    for case in CASES:
        try:
            check_rounded(name, case, device="cuda")
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{case}: {error}")
    return f"{len(failures)} of {len(CASES)}: {failures[0]}"[:600] if failures else f"{len(CASES)} cases"


def _caches() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = torch.zeros(PAGES * 64, 656, dtype=torch.uint8, device="cuda")
    return latent_views(rows, 512, 64), index_views(torch.zeros(PAGES, 8448, dtype=torch.uint8, device="cuda"), 128)


def _step(tokens: int) -> Iterator[Result]:
    angles = torch.rand(tokens, 32, device="cuda") * 1000
    cos, sin = angles.cos(), angles.sin()
    row = torch.randn(tokens, 2240, device="cuda").bfloat16()
    _, index_k, latent, k_pe = row.split([1536, 128, 512, 64], dim=1)
    ones, zeros = torch.ones(512, device="cuda"), torch.zeros(128, device="cuda")
    slots = torch.randperm(PAGES * 64, device="cuda")[:tokens]
    norms = (ones, 1e-6, ones[:128], zeros, 1e-6)
    keys = (latent, k_pe, index_k, *norms, cos, sin, slots, *_caches())
    moved = tokens * (704 * 2 + 64 * 4 + 8 + 656 + 132)
    yield _compare("store_keys", f"{tokens} tokens", moved, IMPLEMENTATIONS, keys, "_KEYS_MANY", tokens > 264)

    wide = torch.randn(tokens, HEADS * 192 + INDEX_HEADS * 128, device="cuda").bfloat16()
    index_q = wide[:, HEADS * 192 :].unflatten(1, (INDEX_HEADS, 128))
    gates = torch.randn(tokens, INDEX_HEADS, device="cuda").bfloat16()
    moved = tokens * INDEX_HEADS * (128 * 3 + 6)
    arguments = (index_q, gates, 0.01, cos, sin)
    yield _compare("index_queries", f"{tokens} tokens", moved, IMPLEMENTATIONS, arguments, "_QUERIES", tokens >= 512)

    q = wide[:, : HEADS * 192].unflatten(1, (HEADS, 192))[..., 128:]
    moved = tokens * HEADS * 64 * 4
    rope = (q, cos, sin, q)
    yield _compare("rope_queries", f"{tokens} tokens", moved, IMPLEMENTATIONS, rope, "_ROPE", tokens >= 512)


def _reads(context: int) -> Iterator[Result]:
    latent_cache, index_cache = _caches()
    table = torch.randperm(PAGES, device="cuda")[: context // 64]
    slots = (table[:, None] * 64 + torch.arange(64, device="cuda")).flatten()
    gathers = kv_store.IMPLEMENTATIONS
    rows = (*latent_cache, slots)
    yield _compare("gather_latent_bf16", f"{context} rows", context * (656 + 8 + 1152), gathers, rows, "_ROWS", True)
    pages = (*index_cache, table[None])
    yield _compare("gather_index_fp8", f"{context} keys", context * 264, gathers, pages, "_ROWS", False)


def _compare(
    function: str,
    shape: str,
    moved: int,
    implementations: Mapping[str, str],
    arguments: tuple[Any, ...],
    setting: str,
    tiles: bool,
) -> Result:
    functions: dict[str, Callable[[], Any]] = {}
    for name in available(implementations):
        found = find(implementations, name, function)
        if found is not None:
            functions[name] = partial(found, *arguments)
    if tiles and "triton" in functions:
        functions |= _tiles(implementations, setting, functions["triton"])
    return time_all(Result(f"{function}, {shape}", moved / BYTES_PER_MS), functions)


def _tiles(
    implementations: Mapping[str, str], setting: str, function: Callable[[], Any]
) -> dict[str, Callable[[], Any]]:
    """The Triton kernel with other tiles."""
    from baleen.kernels.kv_store import triton_kernel as gathers
    from baleen.kernels.mla_inputs import triton_kernel

    module: ModuleType = triton_kernel if implementations is IMPLEMENTATIONS else gathers

    def run(tile: dict[str, int]) -> Any:
        kept = getattr(module, setting)
        setattr(module, setting, tile)
        try:
            return function()
        finally:
            setattr(module, setting, kept)

    return {f"triton {tuple(tile.values())}": partial(run, tile) for tile in TILES[setting]}


if __name__ == "__main__":
    main()
