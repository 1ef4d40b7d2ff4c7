"""The bundled model's greedy answers on a GPU against those of its CPU run, for every pair of attention backends.

`answers_cpu.json` holds the CPU's (float32, an fp8 index as the checkpoint has it); `write_expected` makes it.
Roundings differ on a GPU, so an answer may part from the CPU's where two tokens are nearly equal: the gap of the two
likeliest logits there, on the CPU, tells such a place from an error.
"""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu import wire
from gpu.stages import ROOT, Child, Report, each, environment, table

EXPECTED = Path(__file__).parent / "answers_cpu.json"
MODEL = ROOT / "baleen" / "tiny"
WORD_PROBLEMS = 40
NEEDLES = 2  # of each kind and depth: 20 in all
NEEDLE_TOKENS = 8000
MOST_TOKENS = {"gsm8k": 320, "needle": 96}
CLOSE = 0.5  # a gap of logits up to which a parting of answers is rounding: FP8 moves logits by a few tenths
MOST_CACHED = 1 << 18
SECONDS, AT_ONCE = 95, 5  # of all pairs of backends together; processes at once
FEW = {"gsm8k": 10, "needle": 4}  # questions to a slow pair
CPU = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "float32"}


@dataclass
class Answer:
    """One answer. gaps: between the two likeliest logits at each token; prompt: a checksum of its ids."""

    task: str
    prompt: int
    tokens: list[int]
    gaps: list[float]
    text: str
    right: bool


def problems(tokenizer: Any) -> list[Any]:
    """Word problems of the package, and needles in texts of about 8,000 tokens."""
    from baleen.evals import needle
    from baleen.evals.problems import bundled

    text = needle.sample_text(20_000)
    ratio = len(text) / len(tokenizer.encode(text))
    words = random.Random(0).sample(bundled("gsm8k"), WORD_PROBLEMS)
    return words + needle.generate([NEEDLE_TOKENS], NEEDLES, ratio)


def chosen(asked: list[Any], most: dict[str, int]) -> list[Any]:
    """So many of each task, spread over it; all of a task that `most` does not name."""
    found = []
    for task in dict.fromkeys(one.task for one in asked):
        own = [one for one in asked if one.task == task]
        count = min(most.get(task, len(own)), len(own))
        found += [own[i * len(own) // count] for i in range(count)]
    return found


def ask(settings: dict[str, Any], most: dict[str, int], done: Callable[[list[Answer]], None]) -> list[Answer]:
    """Greedy answers of the bundled model under these settings; `done` gets all so far after each task."""
    from baleen.chat.format import Conversation
    from baleen.evals import scoring
    from baleen.llm import LLM
    from baleen.messages import SamplingParams

    answers: list[Answer] = []
    settings = {"disable_radix_cache": True, "max_running_requests": 64, "skip_server_warmup": True, **settings}
    with LLM(str(MODEL), **settings) as llm:
        asked = chosen(problems(llm.tokenizer), most)
        for task in dict.fromkeys(problem.task for problem in asked):
            own = [problem for problem in asked if problem.task == task]
            prompts = [
                llm.tokenizer.encode(llm.chat_format.encode(Conversation(p.messages, p.tools, p.thinking)).text)
                for p in own
            ]
            sampling = SamplingParams(temperature=0.0, max_new_tokens=MOST_TOKENS[task], logprobs=2)
            for problem, ids, one in zip(own, prompts, llm.generate(prompts, sampling)):
                said = scoring.Answer(content=one.text.rsplit("</think>")[-1])
                gaps = [round(token.top[0][1] - token.top[1][1], 2) for token in one.logprobs]
                right = scoring.RULES[task](said, problem.answer)
                answers.append(Answer(task, zlib.crc32(repr(ids).encode()), one.token_ids, gaps, one.text, right))
            done(answers)
    return answers


def write_expected() -> None:
    """Asks on the CPU and writes the file."""
    wire.stand_in()
    answers = ask(CPU, {}, lambda _: None)
    lines = ",\n".join(json.dumps(asdict(answer)) for answer in answers)
    EXPECTED.write_text(f'{{"settings": {json.dumps(CPU)}, "answers": [\n{lines}\n]}}\n')
    print(accuracy(answers), "right")


def expected() -> list[Answer]:
    return [Answer(**answer) for answer in json.loads(EXPECTED.read_text())["answers"]]


def accuracy(answers: list[Answer]) -> dict[str, str]:
    """Right answers of each task."""
    tasks = dict.fromkeys(answer.task for answer in answers)
    of = {task: [answer.right for answer in answers if answer.task == task] for task in tasks}
    return {task: f"{sum(right)} of {len(right)}" for task, right in of.items()}


def differences(got: list[Answer], wanted: list[Answer]) -> list[dict[str, Any]]:
    """The answers whose text is another, each with where it parts and how near the CPU was to the other token."""
    found = []
    for i, (own, cpu) in enumerate(zip(got, wanted, strict=True)):
        if own.prompt != cpu.prompt:
            raise ValueError(f"question {i} is another than the file's: write it anew")
        if own.text == cpu.text:
            continue
        pairs = enumerate(zip(own.tokens, cpu.tokens))
        at = next((k for k, (a, b) in pairs if a != b), min(len(own.tokens), len(cpu.tokens)))
        gap = cpu.gaps[at] if at < len(cpu.gaps) else None
        found.append({
            "question": i, "task": own.task, "token": at, "gap": gap, "right": own.right, "cpu right": cpu.right,
            "got": own.text[-160:], "cpu": cpu.text[-160:],
        })  # fmt: skip
    return found


def pairs(device: str) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Settings to try and how many questions of each task to ask: the default, which takes masked multi-head prefill
    for short contexts, the pairs of backends without that, and last the torch ones, which are slow.
    """
    from baleen.attention.backend import ATTENTION

    bf16, fp8 = "bfloat16", "fp8_e4m3"
    if device == "cpu":
        few = {"gsm8k": 3, "needle": 0}
        return [(CPU, few), ({**CPU, "kv_cache_dtype": fp8}, few)]
    kinds = [
        (bf16, "flashmla_sparse", "flashmla_sparse"), (fp8, "flashmla_sparse", "flashmla_kv"),
        (bf16, "triton", "triton"), (fp8, "triton", "triton"), (fp8, "flashmla_kv", "flashmla_kv"),
        (bf16, "reference", "reference"), (fp8, "reference", "reference"),
    ]  # fmt: skip
    found: list[tuple[dict[str, Any], dict[str, int]]] = [({"kv_cache_dtype": kv}, {}) for kv in (bf16, fp8)]
    for kv, prefill, decode in kinds:
        if {prefill, decode} <= ATTENTION.keys():
            pair = {"prefill_backend": prefill, "decode_backend": decode, "dense_prefill_threshold": 0}
            found.append(({"kv_cache_dtype": kv, **pair}, FEW if "reference" in pair.values() else {}))
    return found


def answers(device: str, report: Report) -> None:
    """Every pair of backends in a process of its own: the CPU's answers, but where two tokens were nearly equal."""
    report.add("cpu", accuracy=accuracy(expected()))
    environ = environment({"OMP_NUM_THREADS": "1"})  # threads that wait for cores spin
    children = []
    for i, (settings, _) in enumerate(pairs(device)):
        name = " ".join(str(value) for key, value in settings.items() if key != "dense_prefill_threshold")
        stem = report.path.parent / f"answers_{i}"
        stem.with_suffix(".jsonl").unlink(missing_ok=True)
        command = [sys.executable, __file__, device, str(i), str(stem.with_suffix(".jsonl"))]
        children.append(Child(name, command, stem.with_suffix(".output"), environ, SECONDS))
    outputs = {child.name: child.output for child in children}
    rows: list[list[Any]] = []

    def collect(name: str, code: int | None, took: float) -> None:
        path = outputs[name]
        lines = path.with_suffix(".jsonl")
        found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        values: dict[str, Any] = {**(found[-1] if found else {}), "exit": code, "seconds": took}
        if code != 0:
            values.update(ok=False, output=path.read_text()[-1500:] if path.exists() else "not started")
        report.attempt(name, lambda: values)
        shown = " ".join(f"{task} {right}" for task, right in values.get("accuracy", {}).items())
        rows.append([name, code, shown, *(values.get(k) for k in ("same", "of", "largest gap", "ready")), took])

    try:
        each(children, AT_ONCE, SECONDS, collect)
    finally:
        print(table(rows, ["cache, prefill, decode", "exit", "right", "same text", "of", "largest gap", "ready", "s"]))


def child(device: str, index: int, out: Path) -> None:
    """One pair; a line of JSON after each task."""
    began = time.monotonic()
    wire.stand_in()
    from baleen.config import ConfigError

    settings, most = pairs(device)[index]
    wanted = chosen(expected(), most)

    def write(values: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def done(got: list[Answer]) -> None:
        parted = differences(got, wanted[: len(got)])
        far = [one for one in parted if one["gap"] is None or one["gap"] > CLOSE]
        write({
            "ok": not far, "accuracy": accuracy(got), "same": len(got) - len(parted), "of": len(got),
            "largest gap": max((one["gap"] or 0.0 for one in parted), default=0.0),
            "ready": time.monotonic() - began, "parted": parted,
        })  # fmt: skip

    try:
        ask({"device": device, "max_total_tokens": MOST_CACHED, **settings}, most, done)
    except (ConfigError, ImportError) as error:
        write({"refused": str(error)})


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
