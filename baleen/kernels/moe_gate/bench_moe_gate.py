"""moe_gate of the released router. There is no peer that can be called apart from its server: the floor is the bytes.

python -m baleen.kernels.moe_gate.bench_moe_gate FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, correct, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.moe_gate import IMPLEMENTATIONS
from baleen.kernels.moe_gate.cases import CASES

TOKENS = (1, 16, 128, 1024, 8192)


def main() -> None:
    names = available(IMPLEMENTATIONS)
    verdicts = correct(IMPLEMENTATIONS, CASES, names)
    bias = torch.randn(256, device="cuda")
    results = []
    for tokens in TOKENS:
        logits = torch.randn(tokens, 256, device="cuda")
        functions: dict[str, Callable[[], Any]] = {}
        for name in names:
            route = find(IMPLEMENTATIONS, name, "moe_gate")
            assert route is not None
            functions[name] = lambda route=route, logits=logits: route(logits, bias, 8, 4, 8, 2.5, True, 1)
        floor = tokens * (256 * 4 + 9 * 12) / BYTES_PER_MS
        results.append(time_all(Result(f"{tokens} tokens", floor), functions))
    report("moe_gate", results, verdicts)


if __name__ == "__main__":
    main()
