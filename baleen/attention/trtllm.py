"""Attention by TensorRT-LLM's kernels in FlashInfer, on Blackwell. Written to their documentation; never run here.

The sparse form of `trtllm_batch_decode_with_kv_cache_mla` takes, in place of pages, the slots of each query token. It
reads a bfloat16 cache of pages of 64; latents of 512 + 64, keys and values of 128 a head.
"""

from __future__ import annotations

import torch
from flashinfer.mla import trtllm_batch_decode_with_kv_cache_mla
from torch import Tensor

from baleen.attention.kv_pool import KVPool
from baleen.attention.over_rows import OverRows
from baleen.config import PAGE_SIZE

NOPE_DIM = 128  # which the kernel checks, and the absorbed form does not show
WORKSPACE_BYTES = 128 << 20


class TrtllmAttention(OverRows):
    """See `backend.Attention`."""

    multiple = 128

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        super().__init__(pool, softmax_scale, dense_prefill_threshold)
        rows = pool.latent[0]
        assert isinstance(rows, Tensor), "reads a bfloat16 cache"
        # zeros before its first use; later calls leave what they need there
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=rows.device)

    def over(self, query: Tensor, rows: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """See `OverRows.over`. Each query token is a request of its own."""
        width = indices.shape[1]
        out: Tensor = trtllm_batch_decode_with_kv_cache_mla(
            query=query[:, None],
            kv_cache=rows.unflatten(0, (-1, PAGE_SIZE))[:, None],
            workspace_buffer=self._workspace,
            qk_nope_head_dim=NOPE_DIM,
            kv_lora_rank=self.pool.latent_dim,
            qk_rope_head_dim=self.pool.rope_dim,
            block_tables=indices[:, None],
            seq_lens=counts,
            max_seq_len=width,
            sparse_mla_top_k=width,
            bmm1_scale=self.softmax_scale,
            bmm2_scale=1.0,
        )
        return out[:, 0]
