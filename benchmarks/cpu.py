"""What a CPU does: throughput against transformers, overhead of engine and server, decode time by context. Writes
benchmarks/results/.

Run: make bench   (about five minutes on two cores; nothing else should run)
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from transformers import DeepseekV32ForCausalLM

import baleen
from baleen.llm import LLM
from baleen.messages import SamplingParams
from baleen.model.random_checkpoint import official_config, write_random_checkpoint

RESULTS = Path(__file__).parent / "results"
PORT = 30917
PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENT = 128, 64, 16
CONTEXTS = (1024, 4096, 16384)
DECODE_STEPS, DECODE_ROUNDS = 32, 8


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- throughput ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def transformers_throughput(folder: Path) -> float:
    """Output tokens per second of generate with its cache, one prompt after another."""
    model = DeepseekV32ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(seed: int) -> None:
        ids = torch.tensor([random_ids(PROMPT_TOKENS, seed)])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_TOKENS,
            min_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )

    run(999)
    started = time.perf_counter()
    for seed in range(CONCURRENT):
        run(seed)
    return CONCURRENT * OUTPUT_TOKENS / (time.perf_counter() - started)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """`baleen serve` on a port of its own."""
    url = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "baleen", "serve", "--model", str(folder), "--port", str(PORT)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


async def complete(client: httpx.AsyncClient, seed: int, num_tokens: int, stream: bool) -> None:
    body = {
        "model": "default",
        "prompt": random_ids(PROMPT_TOKENS, seed),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == num_tokens
        return
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            pass


async def served_throughput(url: str) -> float:
    """Output tokens per second of concurrent requests over HTTP."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(complete(client, 900 + i, 4, False) for i in range(CONCURRENT)))
        started = time.perf_counter()
        await asyncio.gather(*(complete(client, seed, OUTPUT_TOKENS, False) for seed in range(CONCURRENT)))
        return CONCURRENT * OUTPUT_TOKENS / (time.perf_counter() - started)


# ---- overhead --------------------------------------------------------------------------------------------------------


def metric(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


async def served_overhead(url: str, batch: int = 8, num_tokens: int = 256) -> dict[str, float]:
    """Streamed decode of `batch` requests: the engine's step time, and how much of it lies outside the model's
    forward.
    """
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        running = [asyncio.create_task(complete(client, 100 + i, num_tokens, True)) for i in range(batch)]
        await asyncio.sleep(2.0)  # prefill is over
        samples = []
        while not all(task.done() for task in running):
            text = (await client.get("/metrics")).text
            if metric(text, "sglang:num_running_reqs") == batch:
                samples.append(
                    (
                        time.perf_counter(),
                        metric(text, "sglang:forward_execution_seconds_total"),
                        metric(text, "sglang:num_steps_total"),
                    )
                )
            await asyncio.sleep(0.3)
        await asyncio.gather(*running)
    (t0, forward0, steps0), (t1, forward1, steps1) = samples[0], samples[-1]
    steps = steps1 - steps0
    return {
        "steps": steps,
        "step_ms": 1e3 * (t1 - t0) / steps,
        "forward_ms": 1e3 * (forward1 - forward0) / steps,
        "overhead_percent": 100 * (1 - (forward1 - forward0) / (t1 - t0)),
    }


# ---- decode time by context ------------------------------------------------------------------------------------------


class Stopwatch:
    """Times the calls it wraps, step by step: `steps` holds one dict of seconds by name for each decode step."""

    def __init__(self, runner: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        execute = runner.execute

        def timed_step(batch: Any) -> Any:
            self._now = {}
            started = time.perf_counter()
            result = execute(batch)
            self._now["step"] = time.perf_counter() - started
            if not any(row.token_ids for row in batch.rows):
                self.steps.append(self._now)
            return result

        runner.execute = timed_step

    def wrap(self, owner: Any, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            self._now[name] = self._now.get(name, 0.0) + time.perf_counter() - started
            return result

        object.__setattr__(owner, method, timed)


def median_ms(steps: list[dict[str, float]], name: str) -> float:
    return 1e3 * statistics.median(step.get(name, 0.0) for step in steps)


def decode_by_context(folder: Path) -> list[dict[str, float]]:
    """One request; milliseconds per decoded token in the indexer, the attention, and all else: medians over the steps.

    The indexer is its queries, gates, scores and top-k; its projections run inside MLA's and count as rest.
    The contexts take turns, so that a slow minute of the machine falls on all of them; their prompts stay cached.
    """
    rows = []
    with LLM(str(folder), max_running_requests=1, max_total_tokens=24 * 1024) as llm:
        runner = llm.engine.runner
        watch = Stopwatch(runner)
        watch.wrap(runner.backend, "select", "indexer")
        watch.wrap(runner.backend, "attend", "attention")
        for layer in runner.model.layers:
            watch.wrap(layer.self_attn.indexer, "queries", "indexer")
            watch.wrap(layer.self_attn.indexer, "gates", "indexer")
        steps: dict[int, list[dict[str, float]]] = {context: [] for context in CONTEXTS}
        for _ in range(DECODE_ROUNDS):
            for context in CONTEXTS:
                watch.steps.clear()
                prompt = random_ids(context - DECODE_STEPS, context)
                llm.generate(prompt, SamplingParams(temperature=0, max_new_tokens=DECODE_STEPS, ignore_eos=True))
                steps[context] += watch.steps
        for context in CONTEXTS:
            token, indexer, attention = (median_ms(steps[context], name) for name in ("step", "indexer", "attention"))
            rows.append(
                {
                    "context": context,
                    "token_ms": token,
                    "indexer_ms": indexer,
                    "attention_ms": attention,
                    "rest_ms": token - indexer - attention,
                    "indexer_percent": 100 * indexer / token,
                }
            )
    return rows


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(folder, official_config(), quantized=False, dtype=torch.float32)
        result: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "command": "python benchmarks/cpu.py",
            "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
            "versions": {
                "baleen": baleen.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "model": "DeepseekV32ForCausalLM, 6 layers, hidden 256, 32 M parameters (and 6 M of MTP), float32, random",
        }
        result["transformers_tokens_per_s"] = transformers_throughput(folder)
        with server(folder) as url:
            result["baleen_tokens_per_s"] = asyncio.run(served_throughput(url))
            result["overhead"] = asyncio.run(served_overhead(url))
        result["decode"] = decode_by_context(folder)
    write(result)


def write(result: dict[str, Any]) -> None:
    """The numbers as JSON, and as a table a person can read."""
    ours, theirs, overhead = result["baleen_tokens_per_s"], result["transformers_tokens_per_s"], result["overhead"]
    first, last = result["decode"][0], result["decode"][-1]
    slope = 1e3 * (last["indexer_ms"] - first["indexer_ms"]) / (last["context"] - first["context"])
    lines = [
        f"# CPU, {result['date']}",
        "",
        f"`{result['command']}` on {result['cpu']}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + ".",
        f"Model: {result['model']}.",
        "",
        f"## Throughput, {CONCURRENT} requests of {PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out",
        "",
        "| | output tokens/s |",
        "|---|---|",
        f"| transformers generate with its cache, one after another | {theirs:.0f} |",
        f"| baleen over HTTP, {CONCURRENT} at once | {ours:.0f} ({ours / theirs:.1f} times) |",
        "",
        "## Overhead, 8 streamed requests decoding",
        "",
        f"{overhead['step_ms']:.2f} ms a step, of which {overhead['forward_ms']:.2f} ms in the model's forward: "
        f"**{overhead['overhead_percent']:.1f} %** outside ({overhead['steps']:.0f} steps).",
        "",
        "## Decode time per token by context, one request, index_topk 256",
        "",
        "| context | token ms | indexer ms | attention ms | rest ms | indexer share |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['context']} | {row['token_ms']:.2f} | {row['indexer_ms']:.2f} | {row['attention_ms']:.2f} "
            f"| {row['rest_ms']:.2f} | {row['indexer_percent']:.0f} % |"
            for row in result["decode"]
        ),
        "",
        f"Attention at {last['context']} costs {last['attention_ms'] / first['attention_ms']:.2f} times what it costs "
        f"at {first['context']}: it sees 256 tokens in both. The indexer scores every token: it grows by "
        f"{slope:.2f} ms per 1,000 tokens.",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"cpu_{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
