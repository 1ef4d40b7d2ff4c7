"""The released model's LM head and argmax in decode: our kernel in several configurations, bf16_gemm with greedy after
it, and torch, side by side, as CUDA graphs, as in a server.

python -m baleen.kernels.lm_head.bench_lm_head FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from baleen.kernels import bf16_gemm, greedy
from baleen.kernels.bench_timing import BYTES_PER_MS, Result, captured, median_ms, report
from baleen.kernels.bf16_gemm.triton_kernel import Config, default_config, multiply
from baleen.kernels.lm_head import reference, triton_kernel

HIDDEN, VOCAB = 7168, 129280
TRIED = {  # rows: configurations besides the default
    1: (),
    16: (),
    64: (Config(64, 128, 1, 64, 3, 4, True), Config(64, 256, 1, 64, 4, 8, True), Config(64, 256, 1, 64, 5, 8, True)),
    128: (
        Config(128, 256, 1, 64, 3, 8, True),
        Config(128, 128, 1, 64, 3, 4, True),
        Config(128, 128, 1, 64, 3, 8, True),
        Config(128, 128, 1, 64, 6, 8, True),
        Config(128, 128, 1, 128, 3, 8, True),
    ),
}


def main() -> None:
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda").div_(HIDDEN**0.5)
    hidden = torch.randn(max(TRIED), HIDDEN, dtype=torch.bfloat16, device="cuda")
    _compile(hidden, weight)
    verdicts: dict[str, str] = {}
    report("lm_head", [_measure(hidden[:rows], weight, verdicts) for rows in TRIED], verdicts)


def functions(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Any]]:
    """What is compared; `product` is the default's without ids."""
    rows = hidden.shape[0]
    chosen = default_config(rows, VOCAB, HIDDEN) or triton_kernel.MANY_ROWS
    found: dict[str, Callable[[], Any]] = {
        "torch.mm, argmax": lambda: _with_ids(reference.bf16_gemm(hidden, weight), lambda logits: logits.argmax(1)),
        "bf16_gemm, greedy": lambda: _with_ids(bf16_gemm.bf16_gemm(hidden, weight), greedy.greedy),
        "product": lambda: (multiply(hidden, weight, chosen), None),
    }
    configs = {"triton": chosen, "late": chosen._replace(early=False)} | {_name(c): c for c in TRIED[rows]}
    for name, config in configs.items():
        found[name] = lambda config=config: triton_kernel.lm_head(hidden, weight, config)  # type: ignore[misc]
    return found


def _with_ids(logits: Tensor, argmax: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return logits, argmax(logits)


def _name(config: Config) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k}, {config.stages} stages, {config.warps} warps"


def _compile(hidden: Tensor, weight: Tensor) -> None:
    """Several kernels at a time; what fails here fails again where it is reported."""

    def run(function: Callable[[], Any]) -> None:
        with suppress(Exception), torch.cuda.device(hidden.device):
            function()

    first, *others = (function for rows in TRIED for function in functions(hidden[:rows], weight).values())
    run(first)  # what is set up once
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, others))
    torch.cuda.synchronize()


def _measure(hidden: Tensor, weight: Tensor, verdicts: dict[str, str]) -> Result:
    """Milliseconds of each; into the verdicts, how far logits are from torch's and how many ids are not their own."""
    rows = hidden.shape[0]
    moved = 2 * HIDDEN * (VOCAB + rows) + 4 * rows * VOCAB
    result = Result(f"{rows} x {VOCAB} x {HIDDEN}", moved / BYTES_PER_MS)
    expected = reference.bf16_gemm(hidden, weight).double()
    found = []
    for name, function in functions(hidden, weight).items():
        try:
            replay, (logits, ids) = captured(function)
            replay()
            wrong = 0 if ids is None else int((ids != reference.greedy(logits)).sum())
            found.append(f"{name} {float((logits.double() - expected).norm() / expected.norm()):.1e}, {wrong} wrong")
            result.ms[name] = median_ms(replay, 50)
        except Exception as error:  # a tile that does not fit: the others go on
            result.ms[name] = f"{type(error).__name__}: {error}"[:200]
    verdicts[f"{result.shape}, difference of the norm and ids"] = "; ".join(found)
    print(result, found, flush=True)
    return result


if __name__ == "__main__":
    main()
