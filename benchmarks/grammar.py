"""What a grammar costs on a CPU: masks against the forward that hides them, and its parts with the real vocabulary.
Writes benchmarks/results/.

Run: python benchmarks/grammar.py   (about five minutes on two cores; nothing else should run)
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xgrammar

import baleen
from baleen.chat.conftest import real_tokenizer_json
from baleen.llm import LLM
from baleen.messages import EngineStats, GenerateRequest, Grammar, OpenSlot, SamplingParams, pack_ids
from baleen.model.random_checkpoint import official_config, write_random_checkpoint
from baleen.sampling.grammar import GrammarMasks
from baleen.sampling.grammar_text import GrammarReader, Vocabulary

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 32)
PROMPT_TOKENS, STEPS, ROUNDS = 64, 32, 3
REAL_VOCAB = 129280
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
        "kind": {"enum": ["person", "company"]},
    },
    "required": ["name", "age", "tags", "address", "kind"],
}
TEXT = json.dumps(
    {
        "name": "Jane Margaret Smith",
        "age": 42,
        "tags": ["a few words", "日本語", 'with "quotes" and more'],
        "address": {"street": "1 Long Street, somewhere in the country", "zip": "01234"},
        "kind": "company",
    },
    ensure_ascii=False,
)
TOOL = {"type": "function", "function": {"name": "store_person", "parameters": ITEM}}
# It never ends, so that every step of the measurement has a mask.
ENDLESS = Grammar(kind="json_schema", text=json.dumps({"type": "array", "items": ITEM, "minItems": 100_000}))


# ---- in the engine ---------------------------------------------------------------------------------------------------


@contextmanager
def waiting(masks: GrammarMasks) -> Iterator[None]:
    """The runner waits for the masks before it goes on: what a step costs without the overlap."""
    advance = masks.advance

    def advance_and_wait(*args: Any) -> None:
        advance(*args)
        if masks._work is not None:
            masks._work.result()

    masks.advance = advance_and_wait  # type: ignore[method-assign]
    yield
    masks.advance = advance  # type: ignore[method-assign]


def decode(llm: LLM, batch: int, grammar: Grammar | None) -> dict[str, float]:
    """Milliseconds per step while `batch` requests decode: the whole, the forward, the mask thread, the wait for it."""
    engine, numbers = llm.engine, itertools.count()
    seen: dict[str, int] = {}
    for _ in range(batch):
        rid = str(next(numbers))
        seen[rid] = 0
        generator = torch.Generator().manual_seed(int(rid))
        ids = torch.randint(3, 259, (PROMPT_TOKENS,), generator=generator).tolist()
        sampling = SamplingParams(max_new_tokens=4 * STEPS, seed=int(rid), ignore_eos=True, grammar=grammar)
        engine.add(GenerateRequest(rid=rid, input_ids=pack_ids(ids), sampling=sampling))
    while min(seen.values()) < 4:
        for output in engine.step():
            seen[output.rid] += len(output.token_ids)
    before, started = engine.stats(), time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    seconds, after = time.perf_counter() - started, engine.stats()
    for rid in seen:
        engine.abort(rid)
    while engine.has_work:
        engine.step()

    def per_step(of: Callable[[EngineStats], float]) -> float:
        return 1e3 * (of(after) - of(before)) / STEPS

    return {
        "step_ms": 1e3 * seconds / STEPS,
        "forward_ms": per_step(lambda stats: stats.forward_seconds_total),
        "mask_ms": per_step(lambda stats: stats.grammar_mask_seconds_total),
        "wait_ms": per_step(lambda stats: stats.grammar_wait_seconds_total),
    }


def in_engine(folder: Path) -> list[dict[str, Any]]:
    """Free rows, rows with a grammar, and the same without overlap; they take turns. Medians over the rounds."""
    rows = []
    with LLM(str(folder), max_running_requests=max(BATCHES), max_total_tokens=16384, disable_radix_cache=True) as llm:
        masks = llm.engine.runner.grammars
        decode(llm, max(BATCHES), ENDLESS)
        for batch in BATCHES:
            runs: dict[str, list[dict[str, float]]] = {"free": [], "masked": [], "waiting": []}
            for _ in range(ROUNDS):
                runs["free"].append(decode(llm, batch, None))
                runs["masked"].append(decode(llm, batch, ENDLESS))
                with waiting(masks):
                    runs["waiting"].append(decode(llm, batch, ENDLESS))
            medians = {
                kind: {name: statistics.median(run[name] for run in of_kind) for name in of_kind[0]}
                for kind, of_kind in runs.items()
            }
            rows.append({"batch": batch, **medians})
    return rows


# ---- its parts -------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], repeat: int) -> float:
    """Milliseconds, median."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def parts(llm: LLM) -> dict[str, Any]:
    """With the vocabulary of V3.2: what is done once, once for each grammar, and for each token."""
    started = time.perf_counter()
    tokens = [llm.tokenizer.token_bytes(i) for i in range(REAL_VOCAB)]
    reader = GrammarReader(Vocabulary(tokens, llm.tokenizer.added_ids, (1,)))
    reader.compiler()
    result: dict[str, Any] = {"vocabulary_ms": 1e3 * (time.perf_counter() - started)}
    tools = {"format": "deepseekv32", "tools": [TOOL] * 1, "tool_choice": "required", "parallel_tool_calls": True}
    grammars = {
        "nested JSON schema": Grammar(kind="json_schema", text=json.dumps(ITEM)),
        "any JSON object": Grammar(kind="json_schema", text='{"type": "object"}'),
        "tool call, DSML": Grammar(kind="tools", text=json.dumps(tools)),
        "regex": Grammar(kind="regex", text="[a-z]+@[a-z]+[.](com|org)"),
    }
    reader.compile(grammars["tool call, DSML"])  # its marks: another vocabulary
    result["compile_ms"] = {name: timed(lambda g=grammar: reader.compile(g), 5) for name, grammar in grammars.items()}
    compiled, ids = reader.compile(grammars["nested JSON schema"]), llm.tokenizer.encode(TEXT)
    mask = xgrammar.allocate_token_bitmask(1, REAL_VOCAB)
    times = []
    for _ in range(20):
        matcher = xgrammar.GrammarMatcher(compiled)
        for token_id in ids:
            started = time.perf_counter()
            matcher.fill_next_token_bitmask(mask)
            assert matcher.accept_token(token_id)
            times.append(time.perf_counter() - started)
    result["token_us"] = {"mean": 1e6 * statistics.mean(times), "max": 1e6 * max(times), "tokens": len(ids)}
    result["apply_ms"] = {batch: apply_ms(compiled, grammars["nested JSON schema"], batch) for batch in BATCHES}
    return result


def apply_ms(compiled: Any, grammar: Grammar, batch: int) -> float:
    """Of `batch` rows that stand at the first token of the schema, where nearly all is forbidden."""
    masks = GrammarMasks(batch, REAL_VOCAB, "cpu")
    opened = OpenSlot(sampling=SamplingParams(grammar=grammar), pages=(), num_prompt=0)
    for slot in range(batch):
        masks.open(slot, opened, compiled)
    logits = torch.randn(batch, REAL_VOCAB)
    masks.mask(logits, range(batch))
    milliseconds = timed(lambda: masks.mask(logits, range(batch)), 20)
    masks.close()
    return milliseconds


# ---- report ----------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/grammar.py",
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before",
        "threads": torch.get_num_threads(),
        "versions": {
            "baleen": baleen.__version__,
            "xgrammar": version("xgrammar"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name, vocab_size in (("bytes", 288), ("real", REAL_VOCAB)):
            folder = Path(temporary) / name
            config = official_config(vocab_size=vocab_size, num_nextn_predict_layers=0)
            write_random_checkpoint(folder, config, quantized=False, dtype=torch.float32)
            if name == "real":
                (folder / "tokenizer.json").write_text(real_tokenizer_json(), encoding="utf-8")
            result[name] = in_engine(folder)
        with LLM(str(folder), max_running_requests=1, max_total_tokens=1024) as llm:
            result["parts"] = parts(llm)
    result["load_after"] = os.getloadavg()[0]
    write(result)


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| requests | step, no grammar | step | step, not overlapped | forward | mask thread | of it waited for |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        masked = row["masked"]
        numbers = [row["free"]["step_ms"], masked["step_ms"], row["waiting"]["step_ms"], masked["forward_ms"]]
        numbers += [masked["mask_ms"], masked["wait_ms"]]
        share = 100 * masked["mask_ms"] / masked["forward_ms"]
        cells = [f"{number:.2f}" for number in numbers]
        cells[4] += f" ({share:.1f} % of the forward)"
        lines.append(f"| {row['batch']} | " + " | ".join(cells) + " |")
    return lines


def write(result: dict[str, Any]) -> None:
    """The numbers as JSON, and as tables a person can read."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    detail = result["parts"]
    lines = [
        f"# Grammar masks on a CPU, {result['date']}",
        "",
        f"`{result['command']}` on {result['cpu']}, {result['load_after']:.1f} after; "
        f"{result['threads']} torch threads; {versions}.",
        "Random DeepseekV32ForCausalLM, 6 layers, hidden 256, float32; every request follows a nested JSON schema and "
        f"samples at temperature 1. Milliseconds per decode step, medians of {ROUNDS} rounds of {STEPS} steps.",
        "",
        "## Vocabulary of 288",
        "",
        *table(result["bytes"]),
        "",
        "## Vocabulary of DeepSeek-V3.2, 129,280",
        "",
        *table(result["real"]),
        "",
        "A step also applies the masks to the logits and samples from them: where it differs from the forward. "
        "Here forward and mask thread share the cores; with a GPU the forward leaves them to the masks.",
        "",
        "## Its parts, with the vocabulary of 129,280, one thread",
        "",
        "| | |",
        "|---|---|",
        f"| vocabulary to xgrammar, once | {detail['vocabulary_ms']:.0f} ms |",
        *(f"| compile: {name} | {value:.1f} ms |" for name, value in detail["compile_ms"].items()),
        f"| accept a token and fill the next mask, mean of {detail['token_us']['tokens']} tokens of JSON "
        f"| {detail['token_us']['mean']:.0f} us (max {detail['token_us']['max']:.0f}) |",
        *(
            f"| mask the logits of {rows} rows, nearly all forbidden | {value:.1f} ms |"
            for rows, value in detail["apply_ms"].items()
        ),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"grammar_{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
