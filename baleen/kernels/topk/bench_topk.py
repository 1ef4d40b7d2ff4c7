"""topk against torch.topk and sgl_kernel.fast_topk_v2. python -m baleen.kernels.topk.bench_topk FOLDER"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, correct, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.topk import IMPLEMENTATIONS
from baleen.kernels.topk.cases import CASES, LONG_CASES

K = 2048
SHAPES = (
    *((1, 8192), (1, 32_768), (1, 131_072), (16, 131_072), (32, 32_768), (64, 8192), (64, 131_072), (128, 131_072)),
    *((2048, 8192), (2048, 32_768), (2048, 131_072)),
)


def main() -> None:
    verdicts = correct(IMPLEMENTATIONS, [*CASES, *LONG_CASES], ["cuda"])
    results = []
    for rows, columns in SHAPES:
        logits = torch.randn(rows, columns, device="cuda")
        lengths = torch.full((rows,), columns, device="cuda")
        # Every score once, every position once; of a row of k every position is known.
        result = Result(f"{rows} x {columns}", (4 * rows * columns + 8 * rows * K) / BYTES_PER_MS)
        results.append(time_all(result, _functions(logits, lengths)))
    report("topk", results, verdicts)


def _functions(logits: Tensor, lengths: Tensor) -> dict[str, Callable[[], Any]]:
    functions: dict[str, Callable[[], Any]] = {}
    for name in available(IMPLEMENTATIONS):
        function = find(IMPLEMENTATIONS, name)
        assert function is not None
        if name != "capturable" or logits.numel() < 1 << 25:
            functions[name] = partial(function, logits, lengths, K)
    if "cuda" in functions:
        functions |= _clusters(logits, lengths)
    functions["torch.topk"] = lambda: torch.topk(logits, K, dim=1, sorted=False)
    try:
        from sgl_kernel import fast_topk_v2
    except ImportError:
        return functions
    short = lengths.int()
    functions["fast_topk_v2"] = lambda: fast_topk_v2(logits, short, K)
    return functions


def _clusters(logits: Tensor, lengths: Tensor) -> dict[str, Callable[[], Any]]:
    """The CUDA kernel with other numbers of blocks a row than it chooses: is the choice right?"""
    from baleen.kernels.topk import cuda_kernel

    kernels, num_multiprocessors = cuda_kernel._kernels(logits.device.index)
    rows = logits.shape[0]
    out = torch.empty(rows, K, dtype=torch.int64, device=logits.device)
    return {
        f"cuda, {cluster} blocks" if cluster else "cuda, small blocks": partial(
            kernels[cluster].launch,
            rows * max(cluster, 1),
            1024 if cluster else 512,
            logits,
            logits.stride(0),
            lengths,
            out,
            K,
        )
        for cluster in (0, *cuda_kernel._CLUSTERS)
        if rows * cluster <= 2 * num_multiprocessors
    }


if __name__ == "__main__":
    main()
