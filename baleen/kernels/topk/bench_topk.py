"""topk, topk_slots, topk_mask against torch.topk and sgl_kernel.fast_topk_v2.

python -m baleen.kernels.topk.bench_topk FOLDER
"""

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
    *((rows, columns) for columns in (4096, 8192) for rows in (1, 16, 64, 128)),
    *((1, 32_768), (32, 32_768), (1, 131_072), (16, 131_072), (64, 131_072), (128, 131_072)),
    *((4096, 4096), (2048, 8192), (2048, 32_768), (2048, 131_072)),
)
FALLBACK_SCORES = 1 << 20  # the most that "capturable" is timed at


def main() -> None:
    verdicts = correct(IMPLEMENTATIONS, [*CASES, *LONG_CASES], ["cuda"])
    results = []
    for rows, columns in SHAPES:
        logits = torch.randn(rows, columns, device="cuda")
        lengths = torch.full((rows,), columns, device="cuda")
        # Every score once, every position once.
        result = Result(f"{rows} x {columns}", (4 * rows * columns + 8 * rows * K) / BYTES_PER_MS)
        results.append(time_all(result, _functions(logits, lengths)))
    report("topk", results, verdicts)


def _functions(logits: Tensor, lengths: Tensor) -> dict[str, Callable[[], Any]]:
    functions: dict[str, Callable[[], Any]] = {}
    names = available(IMPLEMENTATIONS)
    rows, columns = logits.shape
    if "cuda" in names:
        pages = torch.randperm(columns // 64, device="cuda").expand(rows, -1).contiguous()
        slots, mask = (find(IMPLEMENTATIONS, "cuda", name) for name in ("topk_slots", "topk_mask"))
        assert slots is not None
        assert mask is not None
        functions["cuda slots"] = partial(slots, logits, lengths, K, pages)
        functions["cuda mask"] = partial(mask, logits, lengths, K)
        functions |= _layouts(logits, lengths)
    for name in names:
        function = find(IMPLEMENTATIONS, name)
        assert function is not None
        if name == "cuda" or (name == "capturable" and logits.numel() <= FALLBACK_SCORES):
            functions[name] = partial(function, logits, lengths, K)
    functions["torch.topk"] = lambda: torch.topk(logits, K, dim=1, sorted=False)
    try:
        from sgl_kernel import fast_topk_v2
    except ImportError:
        return functions
    short = lengths.int()
    functions["fast_topk_v2"] = lambda: fast_topk_v2(logits, short, K)
    return functions


def _layouts(logits: Tensor, lengths: Tensor) -> dict[str, Callable[[], Any]]:
    """Other kernels than the one chosen: is the choice right?"""
    from baleen.kernels.topk import cuda_kernel as cuda

    rows, columns = logits.shape
    num_multiprocessors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    out = torch.empty(rows, K, dtype=torch.int64, device=logits.device)
    chosen = cuda.choose(rows, columns, num_multiprocessors)
    layouts = [layout for layout in cuda.SHORT.values() if columns <= cuda.HELD * layout.threads]
    if not layouts:
        layouts = [layout for layout in cuda.LONG.values() if rows * layout.blocks <= 4 * num_multiprocessors]
    return {
        layout.name: partial(cuda._launch, logits, lengths, K, 0, out, layout=layout)
        for layout in layouts
        if layout != chosen
    }


if __name__ == "__main__":
    main()
