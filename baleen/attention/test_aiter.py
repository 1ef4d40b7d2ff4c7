from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import _load
from baleen.attention.test_backend import CASES
from baleen.attention.test_over_rows import check, stand_in
from baleen.kernels.sparse_mla.reference import sparse_mla


def mla_decode_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    o: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    max_seqlen_q: int,
    sm_scale: float | None = None,
) -> None:
    """q [T, H, D], kv_buffer [pages, page size, 1, D], o [T, H, Dv] written; the rest int32: where the queries and the
    pages of each request begin, the pages, and how much of the last is filled.
    """
    assert sm_scale is not None
    assert q.shape[1] in (16, 128)
    assert q.shape[:2] == o.shape[:2]
    assert kv_buffer.shape[1:] == (1, 1, q.shape[2])
    assert {x.dtype for x in (qo_indptr, kv_indptr, kv_indices, kv_last_page_lens)} == {torch.int32}
    assert torch.equal(kv_last_page_lens, torch.ones(len(q), dtype=torch.int32))
    for b, (first, last) in enumerate(zip(kv_indptr.tolist(), kv_indptr[1:].tolist())):
        assert qo_indptr[b] + max_seqlen_q == qo_indptr[b + 1] == b + 1
        pages = kv_indices[first:last].long()
        o[b] = sparse_mla(q[b : b + 1], kv_buffer[:, 0, 0], pages[None], sm_scale, o.shape[2])[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv", ["float32", "fp8_e4m3"])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str, kv: str) -> None:
    stand_in(monkeypatch, "aiter", {"aiter": {}, "aiter.mla": {"mla_decode_fwd": mla_decode_fwd}})
    check(_load("aiter"), case, kv)
