"""FP8 products of DeepSeek-V3.2's linear layers, in CUDA graphs: ours, DeepGEMM, cuBLAS; and the table of the fastest.

python -m baleen.kernels.fp8_gemm.bench_fp8_gemm FOLDER
writes fp8_gemm.{md,json} there, and tuned_h200.json to be checked in.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from baleen.kernels.bench_timing import Result, correct, report
from baleen.kernels.dispatch import available
from baleen.kernels.fp8_gemm import IMPLEMENTATIONS
from baleen.kernels.fp8_gemm.cases import CASES
from baleen.kernels.fp8_gemm.tune import Measured, floor_ms, tune


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = correct(IMPLEMENTATIONS, CASES, [name for name in available(IMPLEMENTATIONS) if name != "reference"])
    results: list[Result] = []

    def add(num_tokens: int, num_rows: int, num_cols: int, measured: list[Measured]) -> None:
        result = Result(f"{num_tokens} x {num_rows} x {num_cols}", floor_ms(num_tokens, num_rows, num_cols))
        for one in measured:
            kept = result.ms.get(one.choice.use)
            if one.ms is None:
                print(f"{result.shape}: {one.choice} {one.failure}", flush=True)
                result.ms.setdefault(one.choice.use, one.failure)
            elif not isinstance(kept, float) or one.ms < kept:
                result.ms[one.choice.use] = one.ms
        results.append(result)
        ours = " ".join(f"{list(one.choice.config)}:{one.ms:.4f}" for one in measured if one.choice.config and one.ms)
        print(f"{result.shape}: floor {result.floor_ms:.4f} {result.ms} | {ours}", flush=True)

    start = time.monotonic()
    tune(out_path=folder / "tuned_h200.json", report=add)
    print(f"tuned in {time.monotonic() - start:.0f} s", flush=True)
    report("fp8_gemm", results, verdicts)


if __name__ == "__main__":
    main()
