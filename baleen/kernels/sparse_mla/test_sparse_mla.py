"""sparse_mla against loops over tokens and heads in float64, and against dense attention under the selection's mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.sparse_mla import IMPLEMENTATIONS, reference, sparse_mla, sparse_mla_fp8
from baleen.kernels.sparse_mla.cases import CASES
from baleen.kernels.testing import Case, check, largest_scratch


def _loops(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> np.ndarray:
    queries, rows = q.double().numpy(), kv.double().numpy()
    out = np.zeros((*q.shape[:2], d_v))
    for token, head in np.ndindex(*q.shape[:2]):
        chosen = [row for row in indices[token].tolist() if row >= 0]
        if chosen:
            scores = scale * rows[chosen] @ queries[token, head]
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ rows[chosen, :d_v]
    return out


def _loops_fp8(q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float) -> np.ndarray:
    latent = values.float() * scales.repeat_interleave(128, 1)[:, : values.shape[1]]
    return _loops(q, torch.cat((latent, rope.float()), 1), indices, scale, values.shape[1])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_loops(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, {"sparse_mla": _loops, "sparse_mla_fp8": _loops_fp8}[case.function])


def test_equals_sdpa_under_the_mask_of_the_selection() -> None:
    q, kv = torch.randn(7, 4, 48), torch.randn(30, 48)
    indices = torch.stack([torch.randperm(30)[:9] for _ in range(7)])
    mask = torch.zeros(7, 30, dtype=torch.bool).scatter(1, indices, True)
    shared = kv[None].expand(4, -1, -1)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], shared[None], shared[None, ..., :32], attn_mask=mask[None, None], scale=0.2
    )[0].transpose(0, 1)
    torch.testing.assert_close(sparse_mla(q, kv, indices, 0.2, 32), expected, rtol=1e-5, atol=1e-5)


def test_the_order_and_place_of_the_indices_do_not_matter() -> None:
    q, kv = torch.randn(2, 3, 20), torch.randn(10, 20)
    straight = sparse_mla(q, kv, torch.tensor([[1, 4, 7, -1, -1], [0, 2, 3, 5, 9]]), 0.5, 16)
    shuffled = sparse_mla(q, kv, torch.tensor([[-1, 7, -1, 1, 4], [9, 0, 5, 3, 2]]), 0.5, 16)
    torch.testing.assert_close(straight, shuffled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    q, kv = torch.randn(2, 3, 20).to(dtype), torch.randn(10, 20).to(dtype)
    out = sparse_mla(q, kv, torch.tensor([[1, -1], [-1, -1]]), 0.5, 16)
    assert (out.dtype, out.shape) == (dtype, (2, 3, 16))
    assert torch.equal(out[0], kv[1, :16].expand(3, 16))
    assert not bool(out[1].any())


@pytest.mark.parametrize("case", [case for case in CASES if "-9-2-" in str(case) or "fp8" in str(case)], ids=str)
def test_small_chunks_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    function = {"sparse_mla": sparse_mla, "sparse_mla_fp8": sparse_mla_fp8}[case.function]
    whole = function(*case.arguments())
    for tokens in (0, 1, 2, 4):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", tokens * 6 * 138 * 4 + 1)
        got = function(*case.arguments())
        torch.testing.assert_close(
            got.float(), whole.float(), rtol=1e-5 if got.dtype == torch.float32 else 2**-7, atol=1e-5
        )


def test_scratch_stays_small() -> None:
    """The gathered rows of all tokens are 64 MiB."""
    q, kv = torch.randn(64, 2, 128), torch.randn(4096, 128)
    indices = torch.randint(0, 4096, (64, 2048))
    assert largest_scratch(sparse_mla, q, kv, indices, 0.1, 96) <= 8 << 20
