"""Is every kernel right on this GPU, does the model give its CPU's answers, where does a step wait, what does it run?

Run on a machine with a Hopper GPU, from the repository's root:

    python3 benchmarks/gpu_bringup.py --out FOLDER          # about four minutes; results.json, log.txt, profiles.txt

It needs torch, numpy, safetensors, tokenizers, tqdm, msgspec and pytest; for the fast kernels sgl-deep-gemm (with
apache-tvm-ffi) and sgl-flash-mla. The tests are those of `make test-gpu`. Each stage is a process of its own with a
time limit, so that one that fails, hangs or spoils the GPU hides no other. `--device cpu` runs what makes sense there,
to test this script. Speed is measured by gpu_targets.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu import tests
from gpu.serving import config_of
from gpu.shapes import shapes
from gpu.speed import batch, gather_profiles
from gpu.stages import Report, end_on_sigterm, run_here, spawn, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="these alone")
    parser.add_argument("--here", choices=tuple(STAGES), help="this stage alone, in this process")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here:
        return run_here(given.here, STAGES[given.here], given.device, given.out)
    end_on_sigterm()
    work = given.out / "parts"  # as they go: whatever happens to this process, it is there
    work.mkdir(exist_ok=True)
    codes: dict[str, int] = {}
    together = [stage for stage in TOGETHER if stage in given.stage]
    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        running = {pool.submit(spawn, __file__, "--here", s, given.device, work, SECONDS[s]): s for s in together}
        for done in as_completed(running):
            codes[running[done]] = done.result()
            collect(running[done], codes, work, given.out)
    for stage in given.stage:
        if stage not in codes:
            codes[stage] = spawn(__file__, "--here", stage, given.device, work, SECONDS[stage])
            collect(stage, codes, work, given.out)
    print("exit codes:", codes)
    return int(any(codes.values()))


def collect(stage: str, codes: dict[str, int], work: Path, out: Path) -> None:
    """What the stage wrote goes to the few files of `out`, and the end of its log to stdout."""
    log = (work / f"{stage}.log").read_text()
    with (out / "log.txt").open("a") as file:
        file.write(f"==== {stage}\n{log}\n")
    print(f"==== {stage}\n{log[-1600:]}", flush=True)
    found = {name: work / f"{name}.json" for name in codes}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    (out / "results.json").write_text(json.dumps({"exit codes": codes, **results}, indent=1) + "\n")
    (out / "profiles.txt").write_text(gather_profiles(work))


def about(device: str, report: Report) -> None:
    """The machine and the libraries."""
    import torch

    from baleen.hardware import Hardware

    report.add("torch", version=torch.__version__, cuda=torch.version.cuda, python=sys.version)
    report.add("hardware", found=str(Hardware.detect()))
    if device == "cuda":
        report.add("gpu", properties=str(torch.cuda.get_device_properties(0)), free=torch.cuda.mem_get_info())
    for library in ("msgspec", "triton", "deep_gemm", "flash_mla") if device == "cuda" else ("msgspec",):
        report.attempt(library, lambda: {"version": str(getattr(import_module(library), "__version__", "there"))})  # noqa: B023


def waits(device: str, report: Report) -> None:
    """Where a step waits for the GPU, in the released model's dims."""
    import torch

    from baleen.bench.batch import _decode, _prefill
    from baleen.runner.model_runner import ModelRunner

    size, length = (16, 4096) if device == "cuda" else (2, 100)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), device, max_running_requests=size, context_length=length + 512)
        runner = ModelRunner(config)
    prompts = [tuple((5 * i + r) % 500 + 3 for i in range(length)) for r in range(size)]
    kinds = {
        "prefill": lambda: _prefill(prompts, length + 64, config.scheduler.chunked_prefill_size),
        "decode": lambda: _decode(size, length, 6),
    }
    for kind, batches in kinds.items():
        for step in batches():
            runner.execute(step).wait()

        def check(batches: Any = batches) -> dict[str, Any]:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                launched = [runner.execute(step) for step in batches()]
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            launched[-1].wait()
            places = {f"{Path(w.filename).name}:{w.lineno} {str(w.message)[:80]}" for w in seen}
            places = {place for place in places if "prototype feature" not in place}
            return {"ok": not places, "waits": sorted(places)}

        report.attempt(f"{kind}: waits", check)
    if device == "cuda":
        report.add("peak", gib=torch.cuda.max_memory_allocated() / 2**30)


def trace(device: str, report: Report) -> None:
    """The kernels of a decode step and of a prefill step of config B."""
    sizes, length = (["1", "16", "64"], "4096") if device == "cuda" else (["2"], "100")
    options = ["--batch-size", *sizes, "--input-len", length, "--output-len", "16", "--profile"]
    results = batch(report, device, "B", "trace B", options)
    rows = [[r["batch_size"], r["decode_ms"], r["decode_overlapped_ms"], r["prefill_tokens_per_s"]] for r in results]
    print(table(rows, ["batch", "decode ms", "overlapped", "prefill tok/s"]))


STAGES = {
    "about": about,
    "ops": tests.stage(tests.ops, 10, 96),
    "backends": tests.stage(tests.folder("baleen/attention", 4), 4, 105),
    "model": tests.stage(tests.folder("baleen/runner", 5), 5, 105),
    "shapes": shapes,
    "waits": waits,
    "trace": trace,
}
SECONDS = {"about": 60, "ops": 100, "backends": 110, "model": 110, "shapes": 170, "waits": 90, "trace": 120}
TOGETHER = ("about", "ops", "backends", "model", "shapes")  # right or wrong, whatever else runs


if __name__ == "__main__":
    sys.exit(main())
