"""The steps of a warm start: sizes, places, and that a GPU has compiled all of it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baleen.flags import default_config
from baleen.model.random_checkpoint import official_config, write_random_checkpoint
from baleen.runner.model_runner import ModelRunner
from baleen.runner.warm_up import decode_shapes, prefill_steps, warm_up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, official_config(num_nextn_predict_layers=0))
    return path


def config_of(folder: Path, **settings: Any) -> Any:
    sizes = {"max_total_tokens": 1024, "max_running_requests": 4, "context_length": 1024, "chunked_prefill_size": 128}
    return default_config(folder, **{**sizes, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 16), (0, 32), (0, 64), (0, 128), (128, 128)]),
        ({"context_length": 200}, [(0, 16), (0, 32), (0, 64), (0, 128), (128, 71)]),
        ({"context_length": 321, "chunked_prefill_size": 512}, [(0, s) for s in (16, 32, 64, 128, 256, 320)]),
        ({"max_total_tokens": 64, "max_running_requests": 1}, [(0, 16), (0, 32), (0, 64)]),
        ({"context_length": 1, "max_total_tokens": 64, "max_running_requests": 1}, [(0, 1)]),
    ],
)
def test_prompts_of_every_size_and_a_second_chunk(folder: Path, settings: Any, expected: list[tuple[int, int]]) -> None:
    config = config_of(folder, **settings)
    num_pages = config.cache.max_total_tokens // 64
    rows = [row for step in prefill_steps(config, num_pages) for row in step.rows]
    assert [(row.start, len(row.token_ids)) for row in rows] == expected
    for row in rows:
        assert row.open is not None
        assert 64 * len(row.open.pages) >= row.start + len(row.token_ids)
        assert max(row.open.pages) <= num_pages
        assert max(row.token_ids) < config.model.vocab_size


def test_its_steps_run_and_a_cpu_takes_none(folder: Path) -> None:
    config = config_of(folder)
    runner = ModelRunner(config)
    warm_up(runner, config)
    assert runner.forwards.seconds == 0
    for step in prefill_steps(config, runner.num_pages):
        assert len(runner.execute(step).wait().token_ids) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_its_graphs_afterwards(folder: Path) -> None:
    config = config_of(folder, device="cuda")
    runner = ModelRunner(config)
    warm_up(runner, config)
    assert runner.graphs is not None
    assert len(decode_shapes(config)) == len(runner.graphs._graphs) >= 3
    assert runner.forwards.seconds == 0
