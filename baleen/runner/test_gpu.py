"""The runner on a GPU: a small random FP8 checkpoint against its CPU run, and steps that never wait for the GPU.

With every expert chosen and index_topk above the context, rounding is all that differs; where something is chosen, a
rounding moves a choice and with it the logits, which tells nothing. Choices are compared on the bundled model.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.flags import default_config
from baleen.messages import OpenSlot, SamplingParams, ScheduledBatch, ScheduledRow
from baleen.model.random_checkpoint import official_config, write_random_checkpoint
from baleen.runner.model_runner import ModelRunner

PROMPTS = [[(7 * i * (r + 1)) % 250 + 3 for i in range(length)] for r, length in enumerate((300, 77, 190))]
PAGES = 8  # of a request
NUM_STEPS = 8
BOUND = 0.1  # relative error of the logits: FP8 activations that round the other way
SIZES = {
    "hidden_size": 512, "num_hidden_layers": 3, "num_nextn_predict_layers": 0, "num_attention_heads": 64,
    "index_n_heads": 64, "intermediate_size": 1024, "index_topk": 512, "num_experts_per_tok": 16, "topk_group": 4,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {"kernels": "reference", "prefill_backend": "reference", "decode_backend": "reference"},
    "float32": {
        "dtype": "float32", "kernels": "reference", "prefill_backend": "reference", "decode_backend": "reference",
    },
    "eager": {"disable_cuda_graph": True},
    "graphs": {},
    "absorbed prefill": {"dense_prefill_threshold": 0},
    "fp8 cache": {"kv_cache_dtype": "fp8_e4m3"},
    "fp8 cache, absorbed prefill": {"kv_cache_dtype": "fp8_e4m3", "dense_prefill_threshold": 0},
    "fp8 cache, reference": {"kv_cache_dtype": "fp8_e4m3", "kernels": "reference", "prefill_backend": "reference"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, official_config(**SIZES))
    return path


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SETTINGS))
def test_logits_of_the_cpu(folder: Path, name: str, record_property: Any) -> None:
    tokens, logits = _greedy(folder, "cuda", name)
    expected_tokens, expected = _cpu(folder)
    same = [
        next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), NUM_STEPS) for pair in zip(tokens, expected_tokens)
    ]
    # up to and including the token where they part: what comes after has another input
    pairs = [(logits[r, i], expected[r, i]) for r, n in enumerate(same) for i in range(min(n + 1, NUM_STEPS))]
    errors = [float((got - want).norm() / want.norm()) for got, want in pairs]
    record_property("worst", f"{max(errors):.3g}")
    record_property("equal tokens", same)
    assert max(errors) < BOUND, f"{errors}, {same} equal tokens"


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["bfloat16", "fp8_e4m3"])
def test_a_step_never_waits_for_the_gpu(folder: Path, kv: str) -> None:
    runner = ModelRunner(_config(folder, "cuda", kv_cache_dtype=kv, index_topk=128))
    for step in _steps():
        runner.execute(step).wait()  # compiles and captures
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        launched = [runner.execute(step) for step in _steps()]
        torch.cuda.set_sync_debug_mode("default")
    launched[-1].wait()
    waits = {f"{w.filename}:{w.lineno} {w.message}" for w in seen if "prototype feature" not in str(w.message)}
    assert not waits, "\n".join(sorted(waits))


def _config(folder: Path, device: str, *, index_topk: int | None = None, **settings: Any) -> Any:
    sizes = {"max_total_tokens": 4096, "max_running_requests": len(PROMPTS), "context_length": 1024}
    if index_topk is not None:
        settings["json_model_override_args"] = f'{{"index_topk": {index_topk}}}'
    return default_config(folder, device=device, **sizes, **settings)


@cache
def _cpu(folder: Path) -> tuple[list[list[int]], Tensor]:
    return _greedy(folder, "cpu", None)


def _greedy(folder: Path, device: str, name: str | None) -> tuple[list[list[int]], Tensor]:
    """Tokens [R][NUM_STEPS] and logits [R, NUM_STEPS, V] of greedy decode."""
    settings = {"dtype": "float32", "kv_cache_dtype": "float32"} if name is None else SETTINGS[name]
    runner = ModelRunner(_config(folder, device, **settings))
    recorded: list[Tensor] = []
    forward = runner._forward

    def recording(batch: ScheduledBatch) -> Any:
        logits, *rest = forward(batch)
        if logits is not None:
            recorded.append(logits.float().cpu())
        return logits, *rest

    runner._forward = recording  # type: ignore[method-assign]
    launched = [runner.execute(step) for step in _steps()]
    outputs = [step.wait().token_ids for step in launched][1:]
    return [list(row) for row in zip(*outputs)], torch.stack(recorded, dim=1)


def _steps() -> list[ScheduledBatch]:
    """Prompts in two chunks each, then decode."""
    steps: list[list[ScheduledRow]] = [[], []]
    for r, prompt in enumerate(PROMPTS):
        half = len(prompt) // 2 + 1
        pages = tuple(range(1 + PAGES * r, 1 + PAGES * (r + 1)))
        opened = OpenSlot(sampling=SamplingParams(temperature=0.0), pages=pages, num_prompt=len(prompt))
        steps[0].append(ScheduledRow(slot=r, start=0, token_ids=tuple(prompt[:half]), sample=False, open=opened))
        steps[1].append(ScheduledRow(slot=r, start=half, token_ids=tuple(prompt[half:])))
    for i in range(NUM_STEPS - 1):
        steps.append([ScheduledRow(slot=r, start=len(prompt) + i) for r, prompt in enumerate(PROMPTS)])
    return [ScheduledBatch(i, tuple(rows)) for i, rows in enumerate(steps)]
