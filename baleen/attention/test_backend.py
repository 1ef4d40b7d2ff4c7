"""The backend against a plain loop over queries: any mix of requests, page order, phase and layout gives the same
attention.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baleen.attention import selection
from baleen.attention.backend import AttentionBackend, Metadata, make_backend
from baleen.attention.batch import ForwardBatch, group_batch
from baleen.attention.masked import MaskedAttention
from baleen.attention.test_models import index_keys, latents, no_norms, no_rope, small_model
from baleen.kernels.fp8_quant import quantize_1x128
from baleen.kernels.index_logits import plan_pages
from baleen.kernels.testing import assert_few_flips

MODEL = small_model()
HEADS, NOPE, ROPE, VALUE, LATENT = 4, 32, 32, 32, 128
INDEX_HEADS, INDEX_DIM, TOPK = 16, 64, 32


class Requests:
    """Random keys, values and queries of several requests, and a pool with their pages shuffled."""

    def __init__(self, lengths: list[int], q_lens: list[int], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.lengths, self.q_lens = lengths, q_lens
        self.latent = [latents(n, LATENT) for n in lengths]
        self.k_pe = [torch.randn(n, ROPE) for n in lengths]
        self.index_k = [index_keys(n, INDEX_DIM) for n in lengths]
        total = sum(q_lens)
        self.q = torch.randn(total, HEADS, NOPE + ROPE)
        self.index_q = torch.randn(total, INDEX_HEADS, INDEX_DIM)
        self.gates = torch.randn(total, INDEX_HEADS)
        self.kv_b = torch.randn(HEADS, NOPE + VALUE, LATENT) / LATENT**0.5
        pages = [-(-n // 64) for n in lengths]
        ids = torch.randperm(sum(pages)) + 1
        self.num_pages = sum(pages)
        self.page_table = torch.zeros(len(lengths), max(pages), dtype=torch.int64)
        taken = 0
        for r, count in enumerate(pages):
            self.page_table[r, :count] = ids[taken : taken + count]
            taken += count

    def slots(self, r: int, positions: Tensor) -> Tensor:
        return self.page_table[r, positions // 64] * 64 + positions % 64

    def run(self, backend: AttentionBackend) -> tuple[Tensor, list[Tensor | None]]:
        """Store everything (the prefix as an earlier step), then select and attend for the query tokens."""
        selected = self.select(backend)
        return backend.attend(*selected), selected[-1]

    def select(self, backend: AttentionBackend) -> tuple[int, Metadata, list[Tensor], Tensor, list[Tensor | None]]:
        """The first part of `run`: what `attend` takes."""
        for r, length in enumerate(self.lengths):
            positions = torch.arange(length)
            batch = ForwardBatch(
                positions, positions, self.slots(r, positions), self.page_table[r : r + 1], [length], [length], 0
            )
            keys = self.latent[r], self.k_pe[r], self.index_k[r]
            backend.store(0, backend.plan(batch), *keys, no_norms(LATENT, INDEX_DIM), *no_rope(length, ROPE))
        positions = torch.cat([torch.arange(n - q, n) for n, q in zip(self.lengths, self.q_lens)])
        num_decode = next((r for r, q in enumerate(self.q_lens) if q > 1), len(self.q_lens))
        batch = ForwardBatch(positions, positions, positions, self.page_table, self.q_lens, self.lengths, num_decode)
        metadata = backend.plan(batch)
        selection: list[Tensor | None] = [None] * len(metadata.groups)
        rope = no_rope(len(self.gates), ROPE)
        queries = backend.queries(metadata, self.q.clone(), *rope, self.kv_b)
        if backend.needs_scores(metadata):
            selection = backend.select(0, metadata, *backend.index_queries(self.index_q, self.gates, 1.0, *rope))
        return 0, metadata, queries, self.kv_b, selection

    def expected(self) -> Tensor:
        """Query by query: score every token, keep the best 32, expand their keys and values, softmax."""
        out = []
        token = 0
        for r, (length, q_len) in enumerate(zip(self.lengths, self.q_lens)):
            expanded = torch.einsum("sc,hdc->shd", self.latent[r], self.kv_b)
            keys = torch.cat([expanded[..., :NOPE], self.k_pe[r][:, None].expand(-1, HEADS, -1)], dim=-1)
            for i in range(q_len):
                sees = length - q_len + i + 1
                scores = torch.zeros(sees)
                for h in range(INDEX_HEADS):
                    scores += self.gates[token, h] * torch.relu(self.index_k[r][:sees] @ self.index_q[token, h])
                best = scores.topk(min(TOPK, sees)).indices
                weights = torch.einsum("hd,shd->hs", self.q[token], keys[best]) * MODEL.softmax_scale
                out.append(torch.einsum("hs,shd->hd", weights.softmax(-1), expanded[best][..., NOPE:]))
                token += 1
        return torch.stack(out)


def make(requests: Requests, *, threshold: int, kv: str = "float32", index: str = "float32") -> AttentionBackend:
    return make_backend(
        MODEL,
        num_pages=requests.num_pages,
        kv_cache_dtype=kv,
        index_cache_dtype=index,
        prefill="reference",
        decode="reference",
        dense_prefill_threshold=threshold,
        device=torch.device("cpu"),
    )


CASES = {
    "decode, all shorter than top-k": ([5, 32, 1, 17], [1, 1, 1, 1]),
    "decode, all longer": ([33, 200, 64, 65], [1, 1, 1, 1]),
    "decode, lengths far apart": ([10, 900, 31, 400, 32], [1, 1, 1, 1, 1]),
    "prefill from nothing": ([70], [70]),
    "prefill within top-k": ([30], [30]),
    "chunk after a prefix": ([300], [41]),
    "decode and chunks": ([77, 130, 20, 150, 64], [1, 1, 20, 37, 64]),
}


@pytest.mark.parametrize("threshold", [0, 128, 4096])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_loop(case: str, threshold: int) -> None:
    requests = Requests(*CASES[case])
    out, _ = requests.run(make(requests, threshold=threshold))
    torch.testing.assert_close(out, requests.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [0, 4096])
@pytest.mark.parametrize("case", CASES)
def test_quantized_rows_are_those_of_a_plain_loop(case: str, threshold: int) -> None:
    """Whatever groups the step has, and whether their attention is in the latent space."""
    requests = Requests(*CASES[case])
    backend = make(requests, threshold=threshold)
    values, scale = backend.attend_quantized(*requests.select(backend))
    assert values.shape == (sum(requests.q_lens), HEADS * VALUE)
    expected = quantize_1x128(requests.expected().flatten(1))
    assert_few_flips(values, expected.values, 1e-3, scale, expected.scale)


@pytest.mark.parametrize("kv", ["float32", "fp8_e4m3"])
@pytest.mark.parametrize("case", [case for case in CASES if "decode," not in case])
def test_the_masked_form_of_a_gpu_is_the_same(case: str, kv: str) -> None:
    """The selection as a bitmask, keys and values of all heads expanded, whatever else is in the batch."""
    requests = Requests(*CASES[case])
    expected, _ = requests.run(make(requests, threshold=0, kv=kv))
    backend = make(requests, threshold=4096, kv=kv)
    backend._dense = MaskedAttention(backend.pool, MODEL.softmax_scale, TOPK)
    out, _ = requests.run(backend)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", ["float32", "fp8_e4m3"])
def test_keys_of_few_requests_at_a_time_select_the_same(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered at once is bounded by KEY_BYTES; here it holds two requests of the longest group's five."""
    requests = Requests([500, 400, 300, 450, 350], [1] * 5)
    _, whole = requests.run(make(requests, threshold=0, index=index))
    monkeypatch.setattr(selection, "KEY_BYTES", 2 * 8 * 64 * (INDEX_DIM * 4 if index == "float32" else INDEX_DIM + 4))
    backend = make(requests, threshold=0, index=index)
    gathered: list[int] = []
    read = backend.pool.read_index

    def recording(layer: int, page_table: Tensor) -> tuple[Tensor, Tensor | None]:
        gathered.append(page_table.shape[0])
        return read(layer, page_table)

    monkeypatch.setattr(backend.pool, "read_index", recording)
    _, chunked = requests.run(backend)
    assert gathered == [2, 2, 1]
    assert whole[0] is not None
    assert chunked[0] is not None
    assert torch.equal(whole[0], chunked[0])


@pytest.mark.parametrize("index", ["float32", "fp8_e4m3"])
def test_few_rows_of_logits_at_a_time_select_the_same(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests([300], [41])
    _, whole = requests.run(make(requests, threshold=0, index=index))
    monkeypatch.setattr(selection, "LOGITS_BYTES", 7 * 4 * 320)
    _, chunked = requests.run(make(requests, threshold=0, index=index))
    assert whole[0] is not None
    assert chunked[0] is not None
    assert torch.equal(whole[0], chunked[0])


def test_scoring_the_pages_in_place_selects_the_same() -> None:
    """As on a GPU: no key is gathered."""
    requests = Requests([500, 400, 300, 450, 350], [1] * 5)
    backend = make(requests, threshold=0, index="fp8_e4m3")
    out, gathered = requests.run(backend)
    plan = backend.plan

    def planned(batch: ForwardBatch) -> Metadata:
        metadata = plan(batch)
        paged = [replace(group, pages=plan_pages(group.page_table, group.lengths)) for group in metadata.groups]
        return replace(metadata, groups=paged if batch.num_decode else metadata.groups)

    backend.plan = planned  # type: ignore[method-assign]
    backend.pool.read_index = None  # type: ignore[assignment,method-assign]
    in_place, selected = requests.run(backend)
    assert gathered[0] is not None
    assert selected[0] is not None
    assert torch.equal(selected[0], gathered[0])
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("index", ["float32", "fp8_e4m3"])
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("threshold", [0, 4096])
def test_what_the_cache_held_before_does_not_show(kv: str, index: str, threshold: int) -> None:
    """NaN in every slot that the requests have not written, page 0 included, and stale pages past their last ones."""
    requests = Requests([77, 130, 20, 150, 900], [1, 1, 1, 37, 64])
    clean, _ = requests.run(make(requests, threshold=threshold, kv=kv, index=index))
    backend = make(requests, threshold=threshold, kv=kv, index=index)
    for buffer in (*backend.pool.latent, *backend.pool.index):
        parts = [buffer] if isinstance(buffer, Tensor) else vars(buffer).values()
        for part in (part for part in parts if part.dtype != torch.uint8):
            (part.view(torch.int8).fill_(0x7F) if part.dtype == torch.float8_e4m3fn else part.fill_(torch.nan))
    requests.page_table[requests.page_table == 0] = requests.num_pages
    out, _ = requests.run(backend)
    assert torch.equal(out, clean)


@pytest.mark.parametrize("index", ["float32", "fp8_e4m3"])
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("threshold", [0, 4096])
def test_bfloat16_activations(kv: str, index: str, threshold: int) -> None:
    """The same inputs rounded to bfloat16 beforehand: what is left is the rounding of the absorbed query and output,
    and with the fp8 index that of the transformed query, which moves some tokens in and out of the selection."""
    requests = Requests([77, 130, 20, 150], [1, 1, 20, 37])
    for name in ("latent", "k_pe", "index_k"):
        setattr(requests, name, [value.bfloat16().float() for value in getattr(requests, name)])
    for name in ("q", "index_q", "kv_b"):
        setattr(requests, name, getattr(requests, name).bfloat16().float())
    expected, _ = requests.run(make(requests, threshold=threshold, kv=kv, index=index))
    for name in ("q", "index_q", "kv_b"):
        setattr(requests, name, getattr(requests, name).bfloat16())
    out, _ = requests.run(make(requests, threshold=threshold, kv=kv, index=index))
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).norm() / expected.norm()) < (2**-6 if index == "float32" else 0.3)


def test_bfloat16_and_fp8_caches_stay_near() -> None:
    requests = Requests([77, 130, 20, 150], [1, 1, 20, 37])
    expected = requests.expected()
    for kv, bound in (("bfloat16", 2**-7), ("fp8_e4m3", 2**-3)):
        for threshold in (0, 4096):
            out, _ = requests.run(make(requests, threshold=threshold, kv=kv))
            error = float((out.float() - expected).norm() / expected.norm())
            assert 1e-6 < error < bound, (kv, error)


def test_fp8_index_selects_nearly_the_same() -> None:
    requests = Requests([900, 700], [1, 1])
    _, exact = requests.run(make(requests, threshold=0))
    _, packed = requests.run(make(requests, threshold=0, index="fp8_e4m3"))
    assert exact[0] is not None
    assert packed[0] is not None
    for a, b in zip(exact[0].tolist(), packed[0].tolist()):
        assert len(set(a) & set(b)) >= 0.8 * TOPK
    assert not torch.equal(exact[0], packed[0]), "the fp8 index was not used"


def test_decode_groups_bound_the_padding() -> None:
    lengths = [10, 100_000, 300, 70_000, 500, 40]
    batch = ForwardBatch(
        torch.zeros(6, dtype=torch.int64),
        torch.tensor(lengths) - 1,
        torch.zeros(6, dtype=torch.int64),
        torch.zeros(6, 2000, dtype=torch.int64),
        [1] * 6,
        lengths,
        6,
    )
    groups = group_batch(batch)
    seen = []
    for group in groups:
        assert isinstance(group.tokens, Tensor)
        seen += group.tokens.tolist()
        shortest = int(group.lengths.min())
        assert group.max_length <= max(2 * shortest, shortest + 256)
    assert sorted(seen) == list(range(6))
    assert len(groups) == 3
