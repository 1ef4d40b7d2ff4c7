"""First run on a GPU: is every kernel right, does the model give its CPU's answers, how fast is a batch?

Run on a machine with a Hopper GPU, from the repository's root:

    python3 benchmarks/gpu_bringup.py --out FOLDER          # about four minutes; results.json, log.txt

It needs torch, numpy, safetensors, tokenizers and tqdm, and msgspec; for the fast kernels sgl-deep-gemm (with
apache-tvm-ffi) and sgl-flash-mla. Each stage is a process of its own with a time limit, so that one that fails, hangs
or spoils the GPU hides no other. `--device cpu` runs the stages that make sense there, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = {"environment": 60, "ops": 100, "shapes": 100, "attention": 80, "model": 150, "steps": 100, "bench": 180}
TOGETHER = ("environment", "ops", "shapes", "attention", "model")  # right or wrong, whatever else runs
LAYERS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--stage", choices=tuple(SECONDS), help="this one alone, in this process")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.stage:
        return run_stage(given.stage, given.device, given.out)
    codes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(len(TOGETHER)) as pool:
        running = {pool.submit(spawn, stage, given.device, Path(work)): stage for stage in TOGETHER}
        for done in as_completed(running):
            codes[running[done]] = done.result()
            collect(running[done], codes, Path(work), given.out)
        for stage in SECONDS:
            if stage not in codes:
                codes[stage] = spawn(stage, given.device, Path(work))
                collect(stage, codes, Path(work), given.out)
    print("exit codes:", codes)
    return int(any(codes.values()))


def spawn(stage: str, device: str, work: Path) -> int:
    """Run a stage in a process of its own; 124 if its time was up."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--stage", stage, "--device", device, "--out", str(work)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    with (work / f"{stage}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environ, timeout=SECONDS[stage], cwd=ROOT
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        log.write(f"exit {code}, {time.monotonic() - started:.0f} s\n")
    return code


def collect(stage: str, codes: dict[str, int], work: Path, out: Path) -> None:
    """What the stage wrote goes to the few files of `out`, and the end of its log to stdout."""
    log = (work / f"{stage}.log").read_text()
    with (out / "log.txt").open("a") as file:
        file.write(f"==== {stage}\n{log}\n")
    print(f"==== {stage}\n{log[-1200:]}", flush=True)
    found = {name: work / f"{name}.json" for name in codes}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    (out / "results.json").write_text(json.dumps({"exit codes": codes, **results}, indent=1) + "\n")
    for profile in work.glob("profile_*.txt"):
        shutil.copy(profile, out)


def run_stage(stage: str, device: str, out: Path) -> int:
    report = Report(out / f"{stage}.json")
    try:
        {name: globals()[name] for name in SECONDS}[stage](device, report)
    except Exception:
        report.failed += 1
        report.add("stage", error=traceback.format_exc())
    report.write()
    print(f"{report.passed} passed, {report.failed} failed")
    return int(report.failed > 0)


class Report:
    """Lines of a stage; written as they come, so that a crash leaves what was there."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, []
        self.passed = self.failed = 0

    def add(self, name: str, **values: Any) -> None:
        self.lines.append({"name": name, **values})
        print(name, {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in values.items()}, flush=True)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.lines, indent=1, default=str) + "\n")

    def attempt(self, name: str, check: Callable[[], dict[str, Any]]) -> None:
        """`check` returns figures; "ok": False in them, or an exception, is a failure."""
        try:
            values = check()
        except Exception as error:
            values = {"ok": False, "error": "".join(traceback.format_exception(error)[-3:])[-1500:]}
        self.passed += values.get("ok", True)
        self.failed += not values.get("ok", True)
        self.add(name, **values)


def environment(device: str, report: Report) -> None:
    import torch

    from baleen.hardware import Hardware

    report.add("torch", version=torch.__version__, cuda=torch.version.cuda, python=sys.version)
    report.add("hardware", found=str(Hardware.detect()))
    if device == "cuda":
        report.add("gpu", properties=str(torch.cuda.get_device_properties(0)), free=torch.cuda.mem_get_info())
    for library in ("msgspec", "triton", "deep_gemm", "flash_mla"):
        report.attempt(library, lambda: {"version": str(getattr(import_module(library), "__version__", "there"))})  # noqa: B023


# ---- every op on its case list -----------------------------------------------------------------------------------


def ops(device: str, report: Report) -> None:
    """Every implementation that loads, on the GPU, against the reference on the CPU, within the case's tolerance."""
    import baleen.kernels
    from baleen.kernels.dispatch import available, find

    for module in pkgutil.iter_modules(baleen.kernels.__path__):
        if not module.ispkg:
            continue
        listed = import_module(f"baleen.kernels.{module.name}").IMPLEMENTATIONS
        cases = import_module(f"baleen.kernels.{module.name}.cases").CASES
        for name in available(listed):
            functions = {case.function for case in cases}
            own = [case for case in cases if find(listed, name, case.function)]
            worst: dict[str, float] = dict.fromkeys(functions, 0.0)
            failures = []
            for case in own:
                error = case_error(listed, name, case, device)
                if isinstance(error, str):
                    failures.append(f"{case}: {error}")
                else:
                    worst[case.function] = max(worst[case.function], error)
            report.attempt(
                f"{module.name}.{name}",
                lambda: {"ok": not failures, "cases": len(own), "worst": worst, "failures": failures[:6]},  # noqa: B023
            )


def case_error(listed: Any, name: str, case: Any, device: str) -> float | str:
    """Largest difference over the largest magnitude, or what is wrong."""
    import torch
    from torch.utils._pytree import tree_leaves

    from baleen.kernels.dispatch import find
    from baleen.kernels.testing import assert_close, to_device

    function, reference = find(listed, name, case.function), find(listed, "reference", case.function)
    arguments, expected_arguments = case.arguments(), case.arguments()
    if device != "cpu":
        arguments = to_device(arguments, device)
    largest = 0.0
    try:
        got, want = (function(*arguments), arguments), (reference(*expected_arguments), expected_arguments)
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            if isinstance(a, torch.Tensor):
                a = a.cpu()
                assert_close(a, b, case.rtol, case.atol)
                if a.numel() and a.dtype.is_floating_point:
                    largest = max(largest, relative(a, b))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]
    return largest


def relative(got: Any, want: Any) -> float:
    got, want = got.double().nan_to_num(), want.double().nan_to_num()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def milliseconds(function: Callable[[], Any], repeat: int = 20) -> float:
    import torch

    for _ in range(3):
        function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat


# ---- the released model's shapes ---------------------------------------------------------------------------------


def shapes(device: str, report: Report) -> None:
    """Implementations against the reference, both on the GPU, in the released model's shapes, with times."""
    import torch

    from baleen.kernels import fp8_experts, fp8_gemm, index_logits, topk
    from baleen.kernels.dispatch import available, find
    from baleen.kernels.index_logits.cases import paged_inputs
    from baleen.kernels.kv_store.cases import index_views

    g = torch.Generator(device).manual_seed(0)

    def blocks(*shape: int) -> tuple[Any, Any]:
        weight = torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16).mul_(32).to(torch.float8_e4m3fn)
        scale = torch.full((*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128), 2.0**-11, device=device)
        return weight, scale

    def compare(listed: Any, function: str, label: str, arguments: tuple[Any, ...], bound: float) -> None:
        reference = find(listed, "reference", function)
        expected = reference(*arguments)
        for name in available(listed):
            if name == "reference":
                continue

            def check(name: str = name) -> dict[str, Any]:
                run = find(listed, name, function)
                error = relative(run(*arguments), expected)
                return {"ok": error <= bound, "error": error, "ms": milliseconds(lambda: run(*arguments))}

            report.attempt(f"{function}.{name} {label}", check)

    for n, k in ((2240, 7168), (32768, 1536), (7168, 16384), (36864, 7168), (7168, 2048)):
        weight = blocks(n, k)
        for m in (1, 7, 128, 2048):
            x = torch.randn(m, k, generator=g, device=device, dtype=torch.bfloat16)
            compare(fp8_gemm.IMPLEMENTATIONS, "fp8_gemm", f"{m}x{n}x{k}", (x, *weight), 0.01)
    gate_up, down = blocks(32, 4096, 7168), blocks(32, 7168, 2048)
    for tokens in (1, 16, 128, 256, 257, 2048):
        x = torch.randn(tokens, 7168, generator=g, device=device, dtype=torch.bfloat16)
        ids = torch.rand(tokens, 32, generator=g, device=device).topk(8).indices
        weights = torch.rand(tokens, 8, generator=g, device=device)
        label = f"{tokens} tokens, 32 experts"
        compare(fp8_experts.IMPLEMENTATIONS, "fp8_experts", label, (x, ids, weights, *gate_up, *down), 0.03)
    for rows, columns in ((1, 8192), (64, 8192), (16, 131072), (512, 32768)):
        logits = torch.randn(rows, columns, generator=g, device=device)
        lengths = torch.randint(1, columns + 1, (rows,), generator=g, device=device)
        compare(topk.IMPLEMENTATIONS, "topk", f"{rows}x{columns}", (logits, lengths, 2048), 0.0)
    q, weights, keys, scales, table, lengths = (
        x.to(device) for x in paged_inputs([5000, 64, 8192, 1], 64, 128, torch.Generator().manual_seed(0))
    )
    pages = index_views(torch.empty(keys.shape[0], 64 * 132, dtype=torch.uint8, device=device), 128)
    pages[0].copy_(keys)
    pages[1].copy_(scales)
    seen = torch.arange(table.shape[1] * 64, device=device) < lengths[:, None]
    expected = None
    for name in reversed(available(index_logits.IMPLEMENTATIONS)):  # the reference first

        def check(name: str = name) -> dict[str, Any]:
            nonlocal expected
            plan, run = (find(index_logits.IMPLEMENTATIONS, name, f) for f in ("plan_pages", "paged_index_logits"))
            prepared = plan(table, lengths)
            got = run(q, weights, *pages, prepared).masked_fill(~seen, 0.0)
            expected = got if expected is None else expected
            error = relative(got, expected)
            ms = milliseconds(lambda: run(q, weights, *pages, prepared))
            return {"ok": error < 1e-3, "error": error, "ms": ms}

        report.attempt(f"paged_index_logits.{name}", check)
    q8 = torch.randn(1, 512, 64, 128, generator=g, device=device).to(torch.float8_e4m3fn)
    k8 = torch.randn(1, 8192, 128, generator=g, device=device).to(torch.float8_e4m3fn)
    gates = torch.randn(1, 512, 64, generator=g, device=device)
    prefill = (q8, gates, k8, torch.ones(1, 8192, device=device))
    compare(index_logits.IMPLEMENTATIONS, "index_logits", "512 q x 8192 k", prefill, 1e-3)


# ---- attention backends ------------------------------------------------------------------------------------------


def attention(device: str, report: Report) -> None:
    """Each backend on the released model's dims against the torch one, same pool, same selection."""
    import torch

    from baleen.attention import backend as backends
    from baleen.attention.batch import ForwardBatch
    from baleen.config import PUBLISHED, ModelConfig

    model = ModelConfig.from_json(
        {**PUBLISHED["deepseek-ai/DeepSeek-V3.2"], "num_hidden_layers": 1, "first_k_dense_replace": 1}
    )
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Any:
        return torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16)

    kv_b = randn(128, 256, 512) * 512**-0.5
    cases = {"decode": ([1, 70, 2048, 5000], [1] * 4), "prefill": ([3000], [700]), "short": ([300], [300])}
    kinds = [("bfloat16", "flashmla_sparse"), ("fp8_e4m3", "flashmla_kv"), ("fp8_e4m3", "flashmla_sparse")]
    for kv, name in kinds if device == "cuda" else [("bfloat16", "reference")]:
        for case, (lengths, q_lens) in cases.items():
            if (kv, name, case) == ("fp8_e4m3", "flashmla_sparse", "decode"):
                continue

            def check(kv: str = kv, name: str = name, lengths: Any = lengths, q_lens: Any = q_lens) -> dict[str, Any]:
                pages = [-(-n // 64) for n in lengths]
                order = torch.randperm(sum(pages), generator=g, device=device) + 1
                table = torch.zeros(len(lengths), max(pages), dtype=torch.int64, device=device)
                for r, own in enumerate(order.split(pages)):
                    table[r, : len(own)] = own
                backend = backends.make_backend(
                    model, num_pages=sum(pages), kv_cache_dtype=kv, index_cache_dtype="fp8_e4m3", prefill="reference",
                    decode="reference", dense_prefill_threshold=0, device=torch.device(device),
                )  # fmt: skip

                def batch(first: list[int], decode: int) -> ForwardBatch:
                    rows = [(r, torch.arange(a, b, device=device)) for r, (a, b) in enumerate(zip(first, lengths))]
                    slots = torch.cat([table[r, p // 64] * 64 + p % 64 for r, p in rows])
                    positions = torch.cat([p for _, p in rows])
                    counts = [len(p) for _, p in rows]
                    return ForwardBatch(positions, positions, slots, table, counts, lengths, decode)

                everything = batch([0] * len(lengths), 0)
                total = sum(lengths)
                backend.store(0, backend.plan(everything), randn(total, 512), randn(total, 64), randn(total, 128))
                step = batch([n - q for n, q in zip(lengths, q_lens)], len(q_lens) if q_lens[0] == 1 else 0)
                metadata = backend.plan(step)
                tokens = sum(q_lens)
                q, index_q, gates = randn(tokens, 128, 192), randn(tokens, 64, 128), randn(tokens, 64).float()
                selection: list[Any] = [None] * len(metadata.groups)
                if backend.needs_scores(metadata):
                    selection = backend.select(0, metadata, index_q, gates)
                halves = kv_b[:, :128], kv_b[:, 128:].transpose(1, 2)
                expected = backend.attend(0, metadata, q, *halves, selection)
                kernel = backends._load(name)(backend.pool, model.softmax_scale, 0)
                backend._prefill = backend._decode = kernel
                error = relative(backend.attend(0, metadata, q, *halves, selection), expected)
                return {"ok": error < 0.02, "error": error}

            report.attempt(f"{name} {kv} {case}", check)


# ---- a small model -----------------------------------------------------------------------------------------------

PROMPTS = (300, 77, 190)
STEPS = 8


def model(device: str, report: Report) -> None:
    """A small random FP8 checkpoint on the GPU against its CPU run: greedy tokens and the logits behind them."""
    from baleen.model.random_checkpoint import official_config, write_random_checkpoint

    sizes = {
        "hidden_size": 512, "num_hidden_layers": 3, "num_nextn_predict_layers": 0, "num_attention_heads": 64,
        "index_n_heads": 64, "intermediate_size": 1024,
    }  # fmt: skip
    variants = {  # nothing is left out and every expert runs: only rounding differs; and the usual
        "all": {"index_topk": 512, "num_experts_per_tok": 16, "topk_group": 4},
        "sparse": {"index_topk": 128},
    }
    plain = {"kernels": "reference", "prefill_backend": "reference", "decode_backend": "reference"}
    eager = {"disable_cuda_graph": True}
    runs: dict[str, dict[str, Any]] = {
        "float32 reference": {**plain, "dtype": "float32"},
        "bf16 reference": plain,
        "bf16 fastest, eager": eager,
        "bf16 fastest, graphs": {},
        "fp8 kv reference": {**plain, "kv_cache_dtype": "fp8_e4m3"},
        "fp8 kv fastest, eager": {**eager, "kv_cache_dtype": "fp8_e4m3"},
        "fp8 kv fastest, graphs": {"kv_cache_dtype": "fp8_e4m3"},
    }
    if device == "cpu":
        runs = {"float32": {}, "fp8 kv": {"kv_cache_dtype": "fp8_e4m3"}}
    with tempfile.TemporaryDirectory() as root:
        for variant, changes in variants.items():
            folder = Path(root) / variant
            write_random_checkpoint(folder, official_config(**sizes, **changes))
            expected = greedy(folder, {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "float32"})
            for label, settings in runs.items():

                def check(folder: Path = folder, settings: Any = settings, expected: Any = expected) -> dict[str, Any]:
                    return differences(greedy(folder, {"device": device, **settings}), expected, settings)

                report.attempt(f"{variant}: {label}", check)


def differences(got: Any, expected: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Relative rms errors of the logits up to where the tokens part, and how many tokens of each prompt are equal."""
    same = []
    for own, wanted in zip(got[0], expected[0]):
        same.append(next((i for i, (a, b) in enumerate(zip(own, wanted)) if a != b), STEPS))
    errors = []
    for r, equal in enumerate(same):
        for i in range(min(equal + 1, STEPS)):
            errors.append(float((got[1][r, i] - expected[1][r, i]).norm() / expected[1][r, i].norm()))
    bound = 1e-3 if settings.get("dtype") == "float32" else 0.4
    return {"ok": max(errors) < bound, "first": errors[0], "worst": max(errors), "equal tokens": same}


def greedy(folder: Path, settings: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """Tokens [R][STEPS] and logits [R, STEPS, V] of greedy decode, prompts in two chunks each."""
    import torch

    from baleen.flags import default_config
    from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
    from baleen.runner.model_runner import ModelRunner

    sizes = {"max_total_tokens": 4096, "max_running_requests": len(PROMPTS), "context_length": 1024}
    runner = ModelRunner(default_config(folder, **sizes, **settings))
    recorded = []
    sample = runner.sampler.sample

    def recording(logits: Any, *rest: Any) -> Any:
        recorded.append(logits.float().cpu())
        return sample(logits, *rest)

    runner.sampler.sample = recording  # type: ignore[method-assign]
    prompts = [[(7 * i * (r + 1)) % 250 + 3 for i in range(length)] for r, length in enumerate(PROMPTS)]
    steps: list[list[ScheduledRow]] = [[], []]
    for r, prompt in enumerate(prompts):
        half = len(prompt) // 2 + 1
        opened = OpenSlot(
            sampling=SamplingParams(temperature=0.0), pages=tuple(range(1 + 8 * r, 9 + 8 * r)), num_prompt=len(prompt)
        )
        steps[0].append(ScheduledRow(slot=r, start=0, token_ids=tuple(prompt[:half]), sample=False, open=opened))
        steps[1].append(ScheduledRow(slot=r, start=half, token_ids=tuple(prompt[half:])))
    for i in range(STEPS - 1):
        steps.append([ScheduledRow(slot=r, start=len(prompt) + i) for r, prompt in enumerate(prompts)])
    launched = [runner.execute(ScheduledBatch(i, tuple(rows))) for i, rows in enumerate(steps)]
    outputs = [step.wait().token_ids for step in launched][1:]
    return [list(row) for row in zip(*outputs)], torch.stack(recorded, dim=1)


# ---- steps of the large model ------------------------------------------------------------------------------------


def large_config(folder: Path) -> Path:
    """The released config with few layers, and the experts that one GPU of eight has."""
    from baleen.config import PUBLISHED

    few = {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1}
    path = folder / "config.json"
    path.write_text(json.dumps({**PUBLISHED["deepseek-ai/DeepSeek-V3.2"], **few, "n_routed_experts": 32}))
    return path


def steps(device: str, report: Report) -> None:
    """Where a step waits for the GPU, and what its kernels take, in the released model's dims."""
    import torch

    from baleen.bench.batch import _decode, _prefill
    from baleen.flags import default_config
    from baleen.runner.model_runner import ModelRunner

    with tempfile.TemporaryDirectory() as folder:
        large_config(Path(folder))
        config = default_config(
            folder, load_format="dummy", max_running_requests=16, context_length=4608, kv_cache_dtype="fp8_e4m3"
        )
        runner = ModelRunner(config)
    report.add("loaded", seconds=runner.load_seconds, gib=torch.cuda.memory_allocated() / 2**30)
    prompts = [tuple((5 * i + r) % 1000 + 3 for i in range(4096)) for r in range(16)]

    def run(batches: Any) -> None:
        for batch in batches:
            launched = runner.execute(batch)
        launched.wait()

    for kind, batches in (
        ("prefill", lambda: _prefill(prompts[:2], 64, 4096)),
        ("decode", lambda: _decode(16, 4096, 6)),
    ):
        if kind == "decode":
            run(_prefill(prompts, 64, config.scheduler.chunked_prefill_size))
        run(batches())

        def check(batches: Any = batches, kind: str = kind) -> dict[str, Any]:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                launched = [runner.execute(batch) for batch in batches()]
                torch.cuda.set_sync_debug_mode("default")
            launched[-1].wait()
            places = sorted({f"{Path(w.filename).name}:{w.lineno} {str(w.message)[:80]}" for w in seen})
            return {"ok": not places, "waits": places}

        report.attempt(f"{kind}: waits", check)

        def profile(batches: Any = batches, kind: str = kind) -> dict[str, Any]:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                run(batches())
            table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=70)
            (report.path.parent / f"profile_{kind}.txt").write_text(table)
            return {}

        report.attempt(f"{kind}: profile", profile)
    report.add("peak", gib=torch.cuda.max_memory_allocated() / 2**30)


def bench(device: str, report: Report) -> None:
    """`baleen bench batch` on the same model."""
    shape = ["--batch-size", "1", "16", "64", "128", "--input-len", "4096", "--output-len", "16"]
    if device == "cpu":
        shape = ["--batch-size", "1", "--input-len", "64", "--output-len", "3"]
    with tempfile.TemporaryDirectory() as folder:
        config = large_config(Path(folder))
        for label, extra in (
            ("fp8 kv, graphs", ["--kv-cache-dtype", "fp8_e4m3"]),
            ("bf16 kv, graphs", ["--batch-size", "16"]),
            ("fp8 kv, eager", ["--kv-cache-dtype", "fp8_e4m3", "--disable-cuda-graph", "--batch-size", "16"]),
        ):

            def check(extra: list[str] = extra) -> dict[str, Any]:
                command = [
                    sys.executable,
                    "-m",
                    "baleen",
                    "bench",
                    "batch",
                    "--config-only",
                    str(config),
                    *shape,
                    *extra,
                ]
                done = subprocess.run(command, capture_output=True, text=True, timeout=100)
                print(done.stdout, done.stderr, flush=True)
                lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
                return {"ok": done.returncode == 0, "results": lines}

            report.attempt(label, check)


if __name__ == "__main__":
    sys.exit(main())
