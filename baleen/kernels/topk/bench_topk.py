"""topk, topk_slots, topk_mask against torch.topk and sgl_kernel.fast_topk_v2, alone and after DeepGEMM's index scores.

python -m baleen.kernels.topk.bench_topk FOLDER [long]

With "long" only rows of 131,072 scores, checked against torch.topk: under half a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, correct, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.topk import IMPLEMENTATIONS
from baleen.kernels.topk.cases import CASES, LONG_CASES

K = 2048
LONG = ((1, 131_072), (16, 131_072), (64, 131_072), (128, 131_072), (2048, 131_072))
SHAPES = (
    *((rows, columns) for columns in (4096, 8192) for rows in (1, 16, 64, 128)),
    *((1, 32_768), (32, 32_768), *LONG[:-1]),
    *((4096, 4096), (2048, 8192), (2048, 32_768), LONG[-1]),
)
DECODE = (64, 131_072)  # requests, context
FALLBACK_SCORES = 1 << 20  # the most that "capturable" is timed at


def main() -> None:
    only_long = "long" in sys.argv[2:]
    verdicts = {} if only_long else correct(IMPLEMENTATIONS, [*CASES, *LONG_CASES], ["cuda"])
    results = []
    for rows, columns in LONG if only_long else SHAPES:
        results.append(_time(f"{rows} x {columns}", torch.randn(rows, columns, device="cuda"), verdicts))
    for rows in (16, 64):
        results.append(_time(f"{rows} x {DECODE[1]}, relu sums", _relu_sums(rows, DECODE[1]), verdicts))
    results.append(_time_after_scores(*DECODE))
    report("topk", results, verdicts)


def _relu_sums(rows: int, columns: int) -> Tensor:
    """What an indexer gives: sums over 64 heads, most of them within a few hundredths of each other."""
    q, keys = (torch.randn(count, 128, device="cuda", dtype=torch.bfloat16) for count in (rows * 64, columns))
    weights = torch.rand(rows, 64, device="cuda") / (64 * 128**0.5)
    products = (part.float().relu() for part in (heads @ keys.T for heads in q.split(64)))
    return torch.stack([row @ part for row, part in zip(weights, products)])


def _time(shape: str, logits: Tensor, verdicts: dict[str, str]) -> Result:
    rows, columns = logits.shape
    lengths = torch.full((rows,), columns, device="cuda")
    # Every score once, every position once.
    result = Result(shape, (4 * logits.numel() + 8 * rows * K) / BYTES_PER_MS)
    selections = _selections(rows, columns)
    verdicts[shape] = _verdict(selections, logits, lengths)
    functions = {name: partial(select, logits, lengths) for name, select in selections.items()}
    if rows <= 128 or columns < 131_072:
        functions |= _other_forms(logits, lengths)
    functions["torch.topk"] = lambda: torch.topk(logits, K, dim=1, sorted=False)
    return time_all(result, functions)


def _verdict(selections: dict[str, Callable[[Tensor, Tensor], Any]], logits: Tensor, lengths: Tensor) -> str:
    wrong = []
    for name, select in selections.items():
        try:
            if not _is_best(select(logits, lengths), logits):
                wrong.append(name)
        except RuntimeError as error:
            wrong.append(f"{name}: {error}"[:200])
    return f"wrong: {wrong}" if wrong else f"{', '.join(selections)} give the best"


def _is_best(positions: Any, logits: Tensor) -> bool:
    """Whether those are K different positions with the scores of the K best."""
    positions = positions.long().sort(dim=1).values
    chosen = logits.gather(1, positions).sort(dim=1, descending=True).values
    return bool((positions.diff(dim=1) > 0).all()) and torch.equal(chosen, torch.topk(logits, K, dim=1).values)


def _selections(rows: int, columns: int) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Functions of (logits, lengths): what is chosen for this shape, our kernels that are not, SGLang's."""
    selections: dict[str, Callable[[Tensor, Tensor], Any]] = {}
    if "cuda" in available(IMPLEMENTATIONS):
        from baleen.kernels.topk import cuda_kernel as cuda

        num_multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
        chosen = cuda.choose(rows, columns, num_multiprocessors)
        layouts: Iterable[cuda.Layout] = [
            layout for layout in cuda.SHORT.values() if columns <= cuda.HELD * layout.threads
        ] or [
            cuda.LONG,
            *(layout for layout in cuda.RING.values() if rows * layout.blocks <= num_multiprocessors),
        ]

        def run(layout: cuda.Layout, logits: Tensor, lengths: Tensor) -> Tensor:
            out = torch.empty(rows, K, dtype=torch.int64, device="cuda")
            cuda._launch(logits, lengths, K, 0, out, layout=layout)
            return out

        selections["cuda"] = partial(run, chosen)
        selections |= {layout.name: partial(run, layout) for layout in layouts if layout != chosen}
    try:
        from sgl_kernel import fast_topk_v2
    except ImportError:
        return selections
    short = torch.empty(rows, dtype=torch.int32, device="cuda")

    def sglang(logits: Tensor, lengths: Tensor) -> Any:
        return fast_topk_v2(logits, short, K)

    short.fill_(columns)
    selections["fast_topk_v2"] = sglang
    return selections


def _other_forms(logits: Tensor, lengths: Tensor) -> dict[str, Callable[[], Any]]:
    rows, columns = logits.shape
    functions: dict[str, Callable[[], Any]] = {}
    if "cuda" in available(IMPLEMENTATIONS):
        pages = torch.randperm(columns // 64, device="cuda").expand(rows, -1).contiguous()
        slots, mask = (find(IMPLEMENTATIONS, "cuda", name) for name in ("topk_slots", "topk_mask"))
        assert slots is not None
        assert mask is not None
        functions["cuda slots"] = partial(slots, logits, lengths, K, pages)
        functions["cuda mask"] = partial(mask, logits, lengths, K)
    if logits.numel() <= FALLBACK_SCORES:
        capturable = find(IMPLEMENTATIONS, "capturable")
        assert capturable is not None
        functions["capturable"] = partial(capturable, logits, lengths, K)
    return functions


def _time_after_scores(requests: int, context: int) -> Result:
    """DeepGEMM's scores of a decode step and then the best of them, in one CUDA graph."""
    from baleen.kernels.index_logits import bench_index_logits as index

    result = Result(f"decode: scores, then top-k, {requests} x {context}", requests * context * 136 / BYTES_PER_MS)
    if "deep_gemm" not in available(index.IMPLEMENTATIONS):
        return result
    operands, table, lengths = index._pages(requests, context)
    plan = index._function("deep_gemm", "plan_pages")(table, lengths)
    scores = partial(index._function("deep_gemm", "paged_index_logits"), *operands, plan)
    functions = {"scores alone": _captured(scores)}
    for name, select in _selections(requests, context).items():
        functions[name] = _captured(lambda select=select: select(scores(), lengths))
    return time_all(result, functions)


def _captured(function: Callable[[], Any]) -> Callable[[], None]:
    """Replays a CUDA graph of it, which the first call captures."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            function()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            graphs.append(graph)
        graphs[0].replay()

    return replay


if __name__ == "__main__":
    main()
