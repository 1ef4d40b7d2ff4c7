"""index_logits against loops over heads in float64, and transformers' formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dispatch import available, find
from baleen.kernels.index_logits import IMPLEMENTATIONS, index_logits, reference
from baleen.kernels.index_logits.cases import CASES, paged_inputs
from baleen.kernels.testing import Case, check, largest_scratch, run_in_interpreter, to_device


def _loops(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor | None) -> np.ndarray:
    queries, k, w = q.float().double().numpy(), keys.float().double().numpy(), weights.double().numpy()
    out = np.zeros((q.shape[0], q.shape[1], keys.shape[1]))
    for request, query, head in np.ndindex(*q.shape[:3]):
        products = np.array([key @ queries[request, query, head] for key in k[request]])
        out[request, query] += w[request, query, head] * np.where(products > 0, products, 0)
    return out if key_scales is None else out * key_scales.double().numpy()[:, None]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_loops(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _loops)


@pytest.mark.parametrize("lengths", [[1], [64, 130, 65], [700]])
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_pages_against_loops(implementation: str, lengths: list[int]) -> None:
    """Every cached token's score, wherever its page lies; past a request's length is anything."""
    q, weights, keys, scales, table, ends = paged_inputs(lengths, 32, 128, torch.Generator().manual_seed(1))
    plan = find(IMPLEMENTATIONS, implementation, "plan_pages")
    scores = find(IMPLEMENTATIONS, implementation, "paged_index_logits")
    assert plan is not None
    assert scores is not None
    got = scores(q, weights, keys, scales, plan(table, ends))
    for request, length in enumerate(lengths):
        slots = [(int(table[request, i // 64]), i % 64) for i in range(length)]
        own = torch.stack([keys[page, offset].float() for page, offset in slots])
        own_scales = torch.stack([scales[page, offset] for page, offset in slots])
        expected = _loops(q[request, None, None], weights[request, None, None], own[None], own_scales[None])
        torch.testing.assert_close(
            got[request, :length].double(), torch.from_numpy(expected)[0, 0], rtol=1e-5, atol=4e-5
        )


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_columns_before_a_length_are_all_there(implementation: str) -> None:
    """Two chunks of 70 queries, each query seeing one key more than the one before, over keys of no round number."""
    g = torch.Generator().manual_seed(2)
    q, keys = torch.randn(2, 70, 16, 32, generator=g), torch.randn(2, 300, 32, generator=g)
    weights, scales = torch.randn(2, 70, 16, generator=g) / 20, torch.rand(2, 300, generator=g)
    lengths = torch.stack([torch.arange(1, 71), torch.arange(231, 301)])
    arguments = (q.to(torch.float8_e4m3fn), weights, keys.to(torch.float8_e4m3fn), scales)
    scores = find(IMPLEMENTATIONS, implementation, "index_logits")
    assert scores is not None
    visible = torch.arange(300) < lengths[..., None]
    got, expected = scores(*arguments, lengths)[visible], reference.index_logits(*arguments)[visible]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=4e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_the_reference(implementation: str, heads: int) -> None:
    """Pages and chunks, with memory full of NaN. Hopper's FP8 sums keep about 14 bits, of the largest summand."""
    pages = paged_inputs([1000, 64, 3001, 1], heads, 128, torch.Generator().manual_seed(3))
    plan = find(IMPLEMENTATIONS, implementation, "plan_pages")
    paged, chunk = (find(IMPLEMENTATIONS, implementation, name) for name in ("paged_index_logits", "index_logits"))
    assert plan is not None
    assert paged is not None
    assert chunk is not None
    expected = reference.paged_index_logits(*pages[:4], reference.plan_pages(*pages[4:]))
    *operands, table, lengths = to_device(pages, "cuda")
    got = paged(*operands, plan(table, lengths)).cpu()
    visible = torch.arange(expected.shape[1]) < pages[5][:, None]
    tolerance = 1e-3 * float(expected[visible].abs().max())
    torch.testing.assert_close(got[visible], expected[visible], rtol=0, atol=tolerance)

    g = torch.Generator().manual_seed(4)
    q, keys = torch.randn(1, 203, heads, 128, generator=g), torch.randn(1, 1033, 128, generator=g)
    arguments = (q.to(torch.float8_e4m3fn), torch.randn(1, 203, heads, generator=g), keys.to(torch.float8_e4m3fn))
    arguments += (torch.rand(1, 1033, generator=g), torch.arange(831, 1034).unsqueeze(0))
    expected = reference.index_logits(*arguments)
    got = chunk(*to_device(arguments, "cuda")).cpu()
    visible = torch.arange(1033) < arguments[4][..., None]
    tolerance = 1e-3 * float(expected[visible].abs().max())
    torch.testing.assert_close(got[visible], expected[visible], rtol=0, atol=tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The tests of every implementation once more, where Triton interprets its kernels: that is chosen at import."""
    run_in_interpreter(__file__, "triton and (loops or length)")


@pytest.mark.parametrize(("queries", "keys"), [(1, 600), (40, 600)])
def test_equals_the_formula_of_transformers(queries: int, keys: int) -> None:
    """Its scores carry head_dim^-0.5 before the relu and n_heads^-0.5 in the gate; ours both in the weights."""
    q, k, gate = torch.randn(2, queries, 32, 128), torch.randn(2, keys, 128), torch.randn(2, queries, 32)
    scores = F.relu(torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)) * 128**-0.5)
    expected = torch.matmul((gate * 32**-0.5).unsqueeze(-2), scores).squeeze(-2)
    got = index_logits(q, gate * 32**-0.5 * 128**-0.5, k, None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_negative_gate_counts_after_the_relu() -> None:
    q = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]]]])
    keys = torch.tensor([[[2.0, 9.0], [-3.0, 9.0]]])
    weights = torch.tensor([[[1.0, -10.0]]])
    assert index_logits(q, weights, keys, None).tolist() == [[[2.0, -30.0]]]


@pytest.mark.parametrize("queries", [1, 5])
def test_garbage_keys_spoil_their_own_columns_only(queries: int) -> None:
    q, weights, keys = torch.randn(2, queries, 4, 8), torch.randn(2, queries, 4), torch.randn(2, 12, 8)
    clean = index_logits(q, weights, keys, None)
    keys[1, 9:] = float("nan")
    spoilt = index_logits(q, weights, keys, None)
    assert torch.equal(spoilt[0], clean[0])
    assert torch.equal(spoilt[1, :, :9], clean[1, :, :9])


@pytest.mark.parametrize("queries", [1, 37])
@pytest.mark.parametrize("fp8", [False, True])
def test_small_chunks_give_the_same(queries: int, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float8_e4m3fn if fp8 else torch.float32
    q, keys = torch.randn(3, queries, 4, 16).to(dtype), torch.randn(3, 130, 16).to(dtype)
    weights, scales = torch.randn(3, queries, 4), torch.rand(3, 130)
    whole = index_logits(q, weights, keys, scales)
    for budget, columns in ((1, 1), (4 * 3 * 4 * 7, 50), (4 * 4 * 129, 129)):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
        monkeypatch.setattr(reference, "KEYS_PER_CHUNK", columns)
        torch.testing.assert_close(index_logits(q, weights, keys, scales), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("requests", "queries", "fp8"), [(4, 1, False), (4, 1, True), (1, 128, False), (1, 128, True)])
def test_scratch_stays_small(requests: int, queries: int, fp8: bool) -> None:
    """The products of these shapes are 8 MiB and 256 MiB."""
    dtype = torch.float8_e4m3fn if fp8 else torch.float32
    q, keys = torch.zeros(requests, queries, 64, 16, dtype=dtype), torch.zeros(requests, 8192, 16, dtype=dtype)
    scratch = largest_scratch(index_logits, q, torch.zeros(requests, queries, 64), keys, None)
    assert scratch <= 2 << 20
