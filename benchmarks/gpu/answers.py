"""The bundled model's greedy answers on a GPU against those of its CPU run, for every pair of attention backends.

`answers_cpu.json` holds the CPU's (float32, an fp8 index as the checkpoint has it); `write_expected` makes it.
Roundings differ on a GPU, so an answer may part from the CPU's where two tokens are nearly equal: the gap of the two
likeliest logits there, on the CPU, tells such a place from an error.
"""

from __future__ import annotations

import gc
import json
import random
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu import wire
from gpu.stages import ROOT, Report, table

EXPECTED = Path(__file__).parent / "answers_cpu.json"
MODEL = ROOT / "baleen" / "tiny"
WORD_PROBLEMS = 40
NEEDLES = 2  # of each kind and depth: 20 in all
NEEDLE_TOKENS = 8000
MOST_TOKENS = {"gsm8k": 320, "needle": 96}
CLOSE = 0.5  # a gap of logits up to which a parting of answers is rounding: FP8 moves logits by a few tenths
MOST_CACHED = 1 << 18
SECONDS = 150  # no new pair of backends after this
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


def ask(settings: dict[str, Any], tasks: tuple[str, ...] = ("gsm8k", "needle")) -> list[Answer]:
    """Greedy answers of the bundled model under these settings."""
    from baleen.chat.format import Conversation
    from baleen.evals import scoring
    from baleen.llm import LLM
    from baleen.messages import SamplingParams

    with LLM(str(MODEL), disable_radix_cache=True, max_running_requests=64, **settings) as llm:
        asked = [problem for problem in problems(llm.tokenizer) if problem.task in tasks]
        prompts = [
            llm.tokenizer.encode(llm.chat_format.encode(Conversation(p.messages, p.tools, p.thinking)).text)
            for p in asked
        ]
        sampling = [
            SamplingParams(temperature=0.0, max_new_tokens=MOST_TOKENS[problem.task], logprobs=2) for problem in asked
        ]
        completions = llm.generate(prompts, sampling)
    answers = []
    for problem, ids, done in zip(asked, prompts, completions):
        said = scoring.Answer(content=done.text.rsplit("</think>")[-1])
        gaps = [round(token.top[0][1] - token.top[1][1], 2) for token in done.logprobs]
        right = scoring.RULES[problem.task](said, problem.answer)
        answers.append(Answer(problem.task, zlib.crc32(repr(ids).encode()), done.token_ids, gaps, done.text, right))
    return answers


def write_expected() -> None:
    """Asks on the CPU and writes the file."""
    wire.stand_in()
    answers = ask(CPU)
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


def release(device: str) -> None:
    """Give back the GPU memory of an engine that has ended: its graphs lie in cycles."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def pairs(device: str) -> list[dict[str, Any]]:
    """Settings to try: the default, which takes masked multi-head prefill for short contexts, then every prefill and
    decode backend there is, without that; over both caches, the torch backends last.
    """
    from baleen.attention.backend import ATTENTION

    if device == "cpu":
        return [CPU, {**CPU, "kv_cache_dtype": "fp8_e4m3"}]
    found: list[dict[str, Any]] = []
    for kv in ("bfloat16", "fp8_e4m3"):
        found.append({"kv_cache_dtype": kv})
    for kv in ("bfloat16", "fp8_e4m3"):
        for prefill in ATTENTION:
            for decode in ATTENTION:
                pair = {"prefill_backend": prefill, "decode_backend": decode, "dense_prefill_threshold": 0}
                found.append({"kv_cache_dtype": kv, **pair})
    return sorted(found, key=lambda settings: "reference" in settings.values())


def answers(device: str, report: Report) -> None:
    """Every pair of backends that runs here: same answers as the CPU's, but where two tokens were nearly equal."""
    wire.stand_in()
    from baleen.config import ConfigError

    wanted = expected()
    report.add("cpu", accuracy=accuracy(wanted))
    started = time.monotonic()
    rows = []
    tasks = ("gsm8k",) if device == "cpu" else ("gsm8k", "needle")
    wanted = [answer for answer in wanted if answer.task in tasks]
    for settings in pairs(device):
        name = " ".join(str(value) for key, value in settings.items() if key != "dense_prefill_threshold")
        if time.monotonic() - started > SECONDS:
            report.add(name, left_out="no time")
            continue

        def check(settings: dict[str, Any] = settings) -> dict[str, Any]:
            begun = time.monotonic()
            try:
                got = ask({"device": device, "max_total_tokens": MOST_CACHED, **settings}, tasks)
            except (ConfigError, ImportError) as error:
                return {"refused": str(error)}
            finally:
                release(device)
            parted = differences(got, wanted)
            far = [one for one in parted if one["gap"] is None or one["gap"] > CLOSE]
            return {
                "ok": not far, "accuracy": accuracy(got), "same": len(got) - len(parted), "of": len(got),
                "largest gap": max((one["gap"] or 0.0 for one in parted), default=0.0),
                "seconds": time.monotonic() - begun, "parted": parted,
            }  # fmt: skip

        values = report.attempt(name, check)
        if "same" in values:
            rows.append([name, *values["accuracy"].values(), values["same"], values["largest gap"], values["seconds"]])
        elif not values.get("ok", True):
            rows.append([name, "failed"] + [None] * (len(tasks) + 2))
    print(table(rows, ["cache, prefill, decode", *tasks, "same text", "largest gap", "s"]))
