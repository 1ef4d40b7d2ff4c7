"""Decode, prefill and long contexts on the two configs, by `baleen bench batch`, beside what they are measured by.

A: the released dimensions in 4 layers, 256 experts. B: 8 layers, 32 experts, one GPU's share of eight.
Peer: SGLang 0.5.16 on one H200, the better of its MoE runners. Floor: bytes at 4.26 TB/s, with attention arithmetic at
686 TFLOP/s; of prefill arithmetic alone (FP8 products 1,230, attention 450 to 590, indexer 1,000 TFLOP/s).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gpu.stages import CONFIGS, Report, environment, table

SECONDS = 170  # of one `bench batch`
FP8 = ["--kv-cache-dtype", "fp8_e4m3"]
TINY = ["--json-model-override-args", json.dumps({
    "hidden_size": 256, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "num_attention_heads": 4,
    "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 16, "index_n_heads": 4,
    "vocab_size": 512, "index_topk": 64,
})]  # fmt: skip


class Figures(NamedTuple):
    """What a measurement is compared with: the aim, the peer's, the floor; ms of a step, or tokens/s."""

    target: float
    peer: float | None
    floor: float


DECODE = {  # (config, batch): 4096 tokens in, fp8 cache, ms a step
    ("A", 1): Figures(1.6, 2.28, 1.0), ("A", 16): Figures(4.8, 5.39, 3.9),
    ("A", 64): Figures(8.9, 9.65, 7.8), ("A", 128): Figures(10.4, 11.97, 8.9),
    ("B", 1): Figures(2.2, 3.42, 1.6), ("B", 16): Figures(4.2, 5.48, 3.3),
    ("B", 64): Figures(5.0, 6.60, 3.75), ("B", 128): Figures(6.0, 7.49, 4.2),
}  # fmt: skip
PREFILL = {  # (config, tokens in): tokens/s
    ("B", 4096): Figures(62_000, 51_100, 84_000),
    ("A", 16384): Figures(100_000, 89_000, 119_000),
    ("A", 32768): Figures(95_000, 85_500, 112_000),
}
LONG_RATIO = 1.35  # of a decode step at 131,072 tokens of context to one at 4,096


def batch(report: Report, device: str, config: str, label: str, options: list[str]) -> list[dict[str, Any]]:
    """One `baleen bench batch`: its results, each also a line of the report; its profiles go beside the report."""
    prefix = report.path.parent / f"profile_{label.replace(' ', '_')}"
    results = report.path.parent / "bench_batch.jsonl"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "baleen", "bench", "batch", "--config-only", str(CONFIGS / f"{config}.json")]
    command += [*options, *FP8, "--result-filename", str(results), "--profile-filename-prefix", str(prefix)]
    if device == "cpu":
        command += [*TINY, "--device", "cpu"]
    found: list[dict[str, Any]] = []

    def check() -> dict[str, Any]:
        done = subprocess.run(command, stderr=subprocess.STDOUT, timeout=SECONDS, env=environment())
        if results.exists():
            found.extend(json.loads(line) for line in results.read_text().splitlines())
        return {"ok": done.returncode == 0, "command": " ".join(command[2:]), "results": found}

    report.attempt(label, check)
    return found


def decode(device: str, report: Report) -> None:
    """ms of a step at 4,096 tokens of a random cache; a step is waited for before the next, as the peer does."""
    sizes, length, out = ([1, 16, 64, 128], 4096, 32) if device == "cuda" else ([1, 3], 128, 6)
    rows = []
    for config in ("B", "A"):
        options = ["--batch-size", *map(str, sizes), "--input-len", str(length), "--output-len", str(out)]
        options += ["--skip-prefill", "--profile"]
        for result in batch(report, device, config, f"decode {config}", options):
            figures = DECODE.get((config, result["batch_size"]), Figures(0.0, None, 0.0))
            ms = result["decode_ms"]
            ok = "yes" if ms <= figures.target else "no"
            overlapped = result["decode_overlapped_ms"]
            shown = [ms, result["decode_start_ms"], overlapped]
            rows.append([config, result["batch_size"], *shown, *figures, ms / (figures.floor or 1), ok])
    report.add("table", rows=rows)
    header = ["config", "batch", "ms", "of it host", "overlapped", "target", "peer", "floor", "x floor", "met"]
    print(table(rows, header))


def prefill(device: str, report: Report) -> None:
    """Tokens a second of whole prompts; the two longest have to run."""
    runs = {
        "B": (["--batch-size", "1", "8", "--input-len", "4096"], []),
        "A": (["--batch-size", "1", "--input-len", "16384", "32768", "65536", "131072"], []),
        "A chunks of 16384": (["--batch-size", "1", "--input-len", "32768"], ["--chunked-prefill-size", "16384"]),
    }
    if device == "cpu":
        runs = {"B": (["--batch-size", "1", "2", "--input-len", "200"], [])}
    rows = []
    for name, (shape, more) in runs.items():
        options = [*shape, "--output-len", "2", "--profile", *more]
        for result in batch(report, device, name[0], f"prefill {name}", options):
            speed, length = result["prefill_tokens_per_s"], result["input_len"]
            figures = PREFILL.get((name[0], length), (None, None, None))
            ok = "ran" if figures[0] is None else "yes" if speed >= figures[0] else "no"
            rows.append([name, result["batch_size"], length, result["prefill_ms"], speed, *figures, ok])
    report.add("table", rows=rows)
    print(table(rows, ["config", "batch", "in", "ms", "tok/s", "target", "peer", "floor", "met"]))


def long(device: str, report: Report) -> None:
    """A decode step over 131,072 tokens of context against one over 4,096, of 16 requests whose cache is random."""
    lengths, size = ([4096, 131072], 16) if device == "cuda" else ([128, 1024], 2)
    options = ["--batch-size", str(size), "--input-len", *map(str, lengths), "--output-len", "32"]
    results = batch(report, device, "B", "long B", [*options, "--skip-prefill", "--profile"])
    rows = [[r["input_len"], r["decode_ms"], r["decode_overlapped_ms"]] for r in results]
    print(table(rows, ["context", "ms", "overlapped"]))
    if len(results) == 2:
        ratio = results[1]["decode_ms"] / results[0]["decode_ms"]
        report.add("ratio", ratio=ratio, target=LONG_RATIO)
        print(f"ratio {ratio:.3f}, target at most {LONG_RATIO}: {'met' if ratio <= LONG_RATIO else 'missed'}")


def gather_profiles(folder: Path) -> str:
    """The texts of all profiles in a folder, one after another."""
    texts = [f"==== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("profile_*.txt"))]
    return "\n".join(texts)
