"""What the profiler recorded as a list, and a cache of random tokens."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from baleen.attention.kv_pool import KVPool
from baleen.config import ModelConfig
from baleen.model.random_checkpoint import SIZES, official_config
from baleen.runner.measurement import Recorded, _recorded, fill_cache, record


def test_what_the_outermost_operations_took() -> None:
    x = torch.randn(300, 300)

    def work() -> None:
        torch.nn.functional.layer_norm(x @ x, (300,))
        time.sleep(0.01)
        x.cumsum(0)

    found = record(work, torch.device("cpu"))
    names = [one.name for one in found]
    assert names.index("aten::matmul") < names.index("aten::layer_norm") < names.index("aten::cumsum")
    assert "aten::mm" not in names, "it ran within matmul"
    assert all(b.start >= a.start + a.duration for a, b in pairwise(found))
    (cumsum,) = (one for one in found if one.name == "aten::cumsum")
    assert cumsum.start - found[0].start > 10_000


def test_kernels_copies_and_fills_of_a_gpu() -> None:
    def event(category: str, name: str, start: float, **more: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": 2.5, "args": more}

    events = [
        event("kernel", "second", 20.0, correlation=7, grid=[4, 3, 1]),
        event("kernel", "beside it", 20.5, correlation=7, grid=[1, 1, 1]),
        event("gpu_memcpy", "Memcpy HtoD", 10.0, correlation=5),
        event("cuda_runtime", "cudaGraphLaunch", 1.0, correlation=7),
        {"ph": "s", "cat": "ac2g", "name": "flow", "ts": 1.0},
    ]
    assert list(_recorded(events, on_gpu=True)) == [
        Recorded("Memcpy HtoD", 10.0, 2.5, 5, 0),
        Recorded("second", 20.0, 2.5, 7, 12),
        Recorded("beside it", 20.5, 2.5, 7, 1),
    ]


@pytest.mark.parametrize("layout", ["fp8_e4m3", "bfloat16", "float32"])
def test_a_random_cache_is_finite_and_never_the_same_twice(layout: str) -> None:
    model = ModelConfig.from_json(official_config(**{**SIZES["tiny"], "kv_lora_rank": 128}))
    index = "float32" if layout == "float32" else "fp8_e4m3"
    pool = KVPool(model, 20, layout, index, torch.device("cpu"))
    fill_cache(pool)
    slots = torch.arange(21 * 64)
    rows = [pool.read_latent(layer, slots, torch.float32) for layer in range(model.num_hidden_layers)]
    keys, scales = pool.read_index(0, torch.arange(21)[None])
    for values in (*rows, keys.float() * (1 if scales is None else scales[..., None])):
        assert 0.98 < float(values.std()) < 1.02
        assert values.flatten(0, -2).unique(dim=0).shape[0] == 21 * 64
    assert not torch.equal(rows[0], rows[1])
