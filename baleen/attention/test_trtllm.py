from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import _load
from baleen.attention.test_backend import CASES
from baleen.attention.test_over_rows import check, stand_in
from baleen.kernels.sparse_mla.reference import sparse_mla


def trtllm_batch_decode_with_kv_cache_mla(
    query: Tensor,
    kv_cache: Tensor,
    workspace_buffer: Tensor,
    qk_nope_head_dim: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    sparse_mla_top_k: int = 0,
    bmm1_scale: float = 1.0,
    bmm2_scale: float = 1.0,
) -> Tensor:
    """query [B, Q, H, D], kv_cache [pages, 1, 64, D], block_tables int32 [B, Q, top-k] slots, seq_lens int32 [B]."""
    batch, queries, _, dim = query.shape
    assert kv_cache.shape[1:] == (1, 64, dim)
    assert dim == kv_lora_rank + qk_rope_head_dim
    assert qk_nope_head_dim == 128
    assert block_tables.shape == (batch, queries, sparse_mla_top_k)
    assert (block_tables.dtype, seq_lens.dtype, seq_lens.shape) == (torch.int32, torch.int32, (batch,))
    assert int(seq_lens.max()) <= max_seq_len
    assert not workspace_buffer.any(), "zeros at its first use"
    assert bmm2_scale == 1.0
    used = torch.arange(sparse_mla_top_k) < seq_lens[:, None]
    slots = torch.where(used, block_tables[:, 0], -1).long()
    return sparse_mla(query[:, 0], kv_cache.flatten(0, 2), slots, bmm1_scale, kv_lora_rank)[:, None]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    functions = {"trtllm_batch_decode_with_kv_cache_mla": trtllm_batch_decode_with_kv_cache_mla}
    stand_in(monkeypatch, "trtllm", {"flashinfer": {}, "flashinfer.mla": functions})
    monkeypatch.setattr("baleen.attention.trtllm.WORKSPACE_BYTES", 1 << 10)
    check(_load("trtllm"), case, "float32")
