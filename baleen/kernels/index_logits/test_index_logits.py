"""index_logits against loops over heads in float64, and transformers' formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.index_logits import IMPLEMENTATIONS, index_logits, reference
from baleen.kernels.index_logits.cases import CASES
from baleen.kernels.testing import Case, check, largest_scratch


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
