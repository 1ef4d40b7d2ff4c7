"""Products with a float32 result in decode: the LM head, the router's gate, the indexer's head gates; our kernel and
cuBLAS side by side, as CUDA graphs, as in a server.

python -m baleen.kernels.bf16_gemm.bench_bf16_gemm FOLDER
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, median_ms, report
from baleen.kernels.bf16_gemm import reference, triton_kernel
from baleen.kernels.bf16_gemm.triton_kernel import Config, default_config

HIDDEN, VOCAB = 7168, 129280
TOKENS = (1, 16, 64, 128)
# Rows of the weight: products of a graph, each of a weight of its own, which the caches hold nothing of.
CHAINS = {VOCAB: 1, 256: 40, 64: 40, 32: 40}


def main() -> None:
    verdicts: dict[str, str] = {}
    weights = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda").div_(HIDDEN**0.5)
    rows = torch.randn(max(TOKENS), HIDDEN, dtype=torch.bfloat16, device="cuda")
    _compile(rows, weights)
    results = [_measure(rows[:tokens], weights, n, verdicts) for n in CHAINS for tokens in TOKENS]
    report("bf16_gemm", results, verdicts)


def configs(tokens: int, num_rows: int) -> Iterator[tuple[str, Config]]:
    """What the kernel does by itself, where torch.mm is not chosen, and the same without an early start."""
    chosen = default_config(tokens, num_rows, HIDDEN)
    if chosen is not None:
        yield "triton", chosen
        yield "late", chosen._replace(early=False)


def _compile(rows: Tensor, weights: Tensor) -> None:
    """Several kernels at a time; what fails here fails again where it is reported."""

    def run(job: tuple[int, int, Config]) -> None:
        with suppress(Exception), torch.cuda.device(rows.device):
            triton_kernel.bf16_gemm(rows[: job[0]], weights[: job[1]], job[2])

    jobs = {config: (tokens, n, config) for n in CHAINS for tokens in TOKENS for _, config in configs(tokens, n)}
    first, *others = jobs.values()
    run(first)  # what Triton sets up once
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, others))
    torch.cuda.synchronize()


def _measure(x: Tensor, weights: Tensor, num_rows: int, verdicts: dict[str, str]) -> Result:
    """Milliseconds of one product."""
    tokens, length = x.shape[0], CHAINS[num_rows]
    moved = 2 * HIDDEN * (num_rows + tokens) + 4 * tokens * num_rows
    result = Result(f"{tokens} x {num_rows} x {HIDDEN}", moved / BYTES_PER_MS)
    parts = weights.split(num_rows)[:length]
    expected = reference.bf16_gemm(x, parts[0]).double()
    errors = []
    functions: dict[str, Callable[[Tensor], Tensor]] = {"torch.mm": lambda weight: reference.bf16_gemm(x, weight)}
    for name, config in configs(tokens, num_rows):
        functions[name] = lambda weight, config=config: triton_kernel.bf16_gemm(x, weight, config)  # type: ignore[misc]
    for name, function in functions.items():
        try:
            replay, outputs = _captured(function, parts)
            replay()
            errors.append(f"{name} {float((outputs[0].double() - expected).norm() / expected.norm()):.1e}")
            result.ms[name] = median_ms(replay, 50) / length
        except Exception as error:  # a tile that does not fit: the others go on
            result.ms[name] = f"{type(error).__name__}: {error}"[:200]
    verdicts[f"{result.shape}, difference of the norm"] = ", ".join(errors)
    print(result, errors, flush=True)
    return result


def _captured(
    function: Callable[[Tensor], Tensor], weights: tuple[Tensor, ...]
) -> tuple[Callable[[], Any], list[Tensor]]:
    """The replay of all products in turn, and where they write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(weights[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [function(weight) for weight in weights]
    return graph.replay, outputs


if __name__ == "__main__":
    main()
