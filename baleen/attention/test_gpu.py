"""Every attention backend on a GPU, in the released model's dims, against the torch one: same pool, same selection."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import ATTENTION, AttentionBackend
from baleen.attention.batch import ForwardBatch
from baleen.attention.kv_pool import KVPool
from baleen.config import PAGE_SIZE, PUBLISHED, ModelConfig
from baleen.kernels import dispatch
from baleen.runner.measurement import fill_cache

MODEL = ModelConfig.from_json({
    **PUBLISHED["deepseek-ai/DeepSeek-V3.2"], "num_hidden_layers": 1, "first_k_dense_replace": 1,
})  # fmt: skip
BOUND = 0.02  # of the largest value: bfloat16 products and, from an fp8 cache, probabilities in bfloat16


@dataclass(frozen=True)
class Step:
    """lengths: tokens of each request with this step's; q_lens: tokens computed; dense: the masked form up to here."""

    name: str
    lengths: tuple[int, ...]
    q_lens: tuple[int, ...]
    dense: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def is_decode(self) -> bool:
        return max(self.q_lens) == 1


STEPS = (
    Step("decode", (1, 70, 2048, 5000), (1, 1, 1, 1)),
    Step("decode_short", (1, 70, 300), (1, 1, 1)),
    Step("decode_one", (20_000,), (1,)),
    Step("prefill", (3000,), (700,)),
    Step("prefill_short", (300,), (300,)),
    Step("prefill_two", (2500, 400), (600, 300)),
    Step("masked", (3000,), (700,), 8192),
    Step("masked_from_the_start", (2300,), (2300,), 8192),
    Step("masked_short", (300,), (300,), 8192),
)


def _reads(name: str, kv: str, step: Step) -> bool:
    """Which caches the libraries' kernels take."""
    if name == "flashmla_kv":
        return kv == "fp8_e4m3"
    if name in ("flashmla_sparse", "fa3", "tilelang"):
        return kv == "bfloat16" or not step.is_decode
    return True


@pytest.fixture(autouse=True)
def _fastest_kernels() -> None:
    dispatch.use("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("kv", ["bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_backend(name: str, kv: str, step: Step) -> None:
    try:
        import_module(ATTENTION[name].split(":")[0])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("baleen"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    if not _reads(name, kv, step):
        pytest.skip(f"{name} does not read a {kv} cache")
    assert compare(name, kv, step, torch.device("cuda")) < BOUND


@torch.inference_mode()
def compare(name: str, kv: str, step: Step, device: torch.device) -> float:
    """Largest difference of a backend's output from the reference's, over its largest value."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16)

    pages = [-(-n // PAGE_SIZE) for n in step.lengths]
    pool = KVPool(MODEL, sum(pages), kv, "fp8_e4m3", device)
    fill_cache(pool)
    batch = _batch(step, pages, g, device)
    tokens = len(batch.positions)
    q, index_q = randn(tokens, 128, 192), randn(tokens, 64, 128)
    gates, kv_b = randn(tokens, 64), randn(128, 256, 512) * 512**-0.5
    angles = torch.rand(tokens, 32, generator=g, device=device)

    def attend(prefill: str, dense: int) -> Tensor:
        backend = AttentionBackend(MODEL, pool, prefill=prefill, decode=prefill, dense_prefill_threshold=dense)
        metadata = backend.plan(batch)
        selection: list[Tensor | None] = [None] * len(metadata.groups)
        rope = angles.cos(), angles.sin()
        if backend.needs_scores(metadata):
            selection = backend.select(0, metadata, *backend.index_queries(index_q, gates, 1.0, *rope))
        queries = backend.queries(metadata, q.clone(), *rope, kv_b)
        return backend.attend(0, metadata, queries, kv_b, selection)

    got, want = attend(name, step.dense).double(), attend("reference", 0).double()
    assert bool(got.isfinite().all())
    return float((got - want).abs().max() / want.abs().max())


def _batch(step: Step, pages: list[int], g: torch.Generator, device: torch.device) -> ForwardBatch:
    """The last tokens of each request, whose pages lie in any order."""
    order = torch.randperm(sum(pages), generator=g, device=device) + 1
    table = torch.zeros(len(pages), max(pages), dtype=torch.int64, device=device)
    for row, own in zip(table, order.split(pages)):
        row[: len(own)] = own
    positions = [torch.arange(n - q, n, device=device) for n, q in zip(step.lengths, step.q_lens)]
    slots = [row[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for row, p in zip(table, positions)]
    return ForwardBatch(
        ids=torch.cat(positions),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        page_table=table,
        q_lens=list(step.q_lens),
        seq_lens=list(step.lengths),
        num_decode=len(step.lengths) if step.is_decode else 0,
    )
