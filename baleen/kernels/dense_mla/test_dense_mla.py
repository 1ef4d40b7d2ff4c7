"""dense_mla and masked_mha against loops in float64; dense_mla against torch's attention, and against sparse_mla on the
latents it was expanded from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dense_mla import IMPLEMENTATIONS, dense_mla, masked_mha, reference
from baleen.kernels.dense_mla.cases import CASES, GPU_CASES, masked
from baleen.kernels.dispatch import available, find
from baleen.kernels.sparse_mla import sparse_mla
from baleen.kernels.testing import Case, check, largest_scratch, run_in_interpreter


def _loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> np.ndarray:
    queries, keys, values = q.double().numpy(), k.double().numpy(), v.double().numpy()
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for query, head in np.ndindex(*q.shape[:2]):
        seen = mask[query].numpy()
        if seen.any():
            scores = scale * keys[seen, head] @ queries[query, head]
            weights = np.exp(scores - scores.max())
            out[query, head] = weights / weights.sum() @ values[seen, head]
    return out


def _masked_loops(
    q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, mask: Tensor | None, start: int, scale: float, dense_rows: int
) -> np.ndarray:
    visible = torch.zeros(len(q), len(v), dtype=torch.bool)
    for query in range(len(q)):
        seen = start + query + 1
        if mask is None or seen <= dense_rows:
            visible[query, :seen] = True
        else:
            bits = "".join(f"{word & 0xFFFFFFFF:032b}"[::-1] for word in mask[query].tolist())
            visible[query, :seen] = torch.tensor([bit == "1" for bit in bits[:seen]])
    k = torch.cat((k_nope, k_pe.unsqueeze(1).repeat(1, q.shape[1], 1)), 2)
    return _loops(q, k, v, visible, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_loops(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _loops if case.function == "dense_mla" else _masked_loops)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [case for case in CASES + GPU_CASES if case.function == "masked_mha"], ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_the_reference(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_the_same_every_time(implementation: str) -> None:
    """A buffer reused too early would show."""
    function = find(IMPLEMENTATIONS, implementation, "masked_mha")
    assert function is not None
    *tensors, start, scale, dense_rows = masked(900, 300, 40, (128, 64, 128), 200, "mask", torch.Generator())
    tensors = [x.cuda() for x in tensors]
    first = function(*tensors, start, scale, dense_rows)
    assert all(torch.equal(function(*tensors, start, scale, dense_rows), first) for _ in range(50))


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The tests of every implementation once more, where Triton interprets its kernels: that is chosen at import."""
    run_in_interpreter(__file__, "triton and masked_mha and loops")


def test_a_mask_of_all_bits_is_no_mask() -> None:
    q, k_nope, k_pe, v, mask, start, scale, _ = masked(40, 30, 2, (16, 8, 16), 1000, "mask", torch.Generator())
    expected = masked_mha(q, k_nope, k_pe, v, None, start, scale)
    assert torch.equal(masked_mha(q, k_nope, k_pe, v, mask, start, scale), expected)
    # Words of queries that see no more than dense_rows are not looked at.
    mask[: 50 - start] = 0
    assert torch.equal(masked_mha(q, k_nope, k_pe, v, mask, start, scale, 50), expected)
    assert not torch.equal(masked_mha(q, k_nope, k_pe, v, mask, start, scale, 49), expected)


@pytest.mark.parametrize("prefix", [0, 50])
def test_under_a_causal_mask_it_is_torch_attention(prefix: int) -> None:
    keys = 96 + prefix
    q, k, v = torch.randn(96, 4, 48), torch.randn(keys, 4, 48), torch.randn(keys, 4, 32)
    mask = torch.ones(96, keys, dtype=torch.bool).tril(prefix)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.1)[0].transpose(0, 1)
    torch.testing.assert_close(dense_mla(q, k, v, mask, 0.1), expected, rtol=1e-5, atol=1e-5)


def test_expanded_equals_absorbed() -> None:
    """MLA's identity: q_nope . (W_uk c) = (W_uk^T q_nope) . c, and the sum over W_uv c is W_uv of the sum over c."""
    tokens, heads, keys, nope, rope, latent, value = 11, 4, 60, 16, 8, 64, 12
    q_nope, q_rope = torch.randn(tokens, heads, nope), torch.randn(tokens, heads, rope)
    c, k_rope = torch.randn(keys, latent), torch.randn(keys, rope)
    w_k, w_v = torch.randn(heads, nope, latent) * latent**-0.5, torch.randn(heads, value, latent) * latent**-0.5
    indices = torch.stack([torch.randperm(keys)[:20] for _ in range(tokens)])
    indices[3, 5:] = -1
    mask = torch.zeros(tokens, keys, dtype=torch.bool)
    for token, row in enumerate(indices.tolist()):
        mask[token, [key for key in row if key >= 0]] = True

    k = torch.cat((torch.einsum("sc,hnc->shn", c, w_k), k_rope[:, None].expand(-1, heads, -1)), -1)
    v = torch.einsum("sc,hvc->shv", c, w_v)
    expanded = dense_mla(torch.cat((q_nope, q_rope), -1), k, v, mask, 0.2)

    absorbed_q = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_k), q_rope), -1)
    absorbed = sparse_mla(absorbed_q, torch.cat((c, k_rope), 1), indices, 0.2, latent)
    torch.testing.assert_close(torch.einsum("thc,hvc->thv", absorbed, w_v), expanded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 3, 8).to(dtype), torch.randn(4, 3, 8).to(dtype), torch.randn(4, 3, 6).to(dtype)
    out = dense_mla(q, k, v, torch.tensor([[False, True, False, False], [False] * 4]), 1.0)
    assert (out.dtype, out.shape) == (dtype, (2, 3, 6))
    assert torch.equal(out[0], v[1])
    assert not bool(out[1].any())


@pytest.mark.parametrize("case", [case for case in CASES if "-13-13-" in str(case)], ids=str)
def test_small_chunks_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dense_mla(*case.arguments())
    for queries in (0, 1, 5, 12):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", queries * 13 * 3 * 4 + 1)
        got = dense_mla(*case.arguments())
        torch.testing.assert_close(
            got.float(), whole.float(), rtol=1e-5 if got.dtype == torch.float32 else 2**-7, atol=1e-5
        )


def test_scratch_stays_small() -> None:
    """The scores of all queries are 64 MiB."""
    q, k = torch.randn(512, 8, 8), torch.randn(4096, 8, 8)
    mask = torch.ones(512, 4096, dtype=torch.bool)
    assert largest_scratch(dense_mla, q, k, k, mask, 0.1) <= 8 << 20
