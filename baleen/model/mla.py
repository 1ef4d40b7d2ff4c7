"""Multi-head latent attention with DeepSeek Sparse Attention: projections on both sides of the attention backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from baleen.attention.backend import AttentionBackend, Metadata
from baleen.config import ModelConfig
from baleen.kernels.rope import rope_interleaved
from baleen.model.indexer import Indexer
from baleen.model.layers import Linear, Precision, RMSNorm, weight
from baleen.model.weights import Target


class MlaAttention(nn.Module):
    """One attention block. A head's query is [nope | rope], rope last, pairs interleaved (`rope_interleaved`).

    qkv_a  one GEMM over x: q_a_proj | indexer.wk | kv_a_proj_with_mqa, the one of no whole FP8 blocks last
    q_b    one GEMM over the normed q latent: q_b_proj | indexer.wq_b
    """

    def __init__(self, config: ModelConfig, layer: int, precision: Precision) -> None:
        super().__init__()
        self.layer = layer
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.num_heads = config.num_attention_heads
        self.index_key_dim = config.index_head_dim
        fp8 = config.quantization is not None
        self.qkv_a = Linear(
            config.hidden_size,
            {
                "q_a_proj": self.q_lora_rank,
                "indexer.wk": self.index_key_dim,
                "kv_a_proj_with_mqa": self.kv_lora_rank + self.rope_dim,
            },
            fp8=fp8,
            precision=precision,
        )
        self.q_a_layernorm = RMSNorm(self.q_lora_rank, config.rms_norm_eps)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, config.rms_norm_eps)
        self.q_dim = self.num_heads * config.qk_head_dim
        self.q_b = Linear(
            self.q_lora_rank,
            {"q_b_proj": self.q_dim, "indexer.wq_b": config.index_n_heads * config.index_head_dim},
            fp8=fp8,
            precision=precision,
        )
        # kv_b_proj [H, nope + v, latent]; its halves are used per head and never quantised at run time
        self.kv_b_proj = weight(self.num_heads, self.nope_dim + self.v_dim, self.kv_lora_rank, dtype=precision.dtype)
        self.kv_b_kind: Literal["linear", "plain"] = "linear" if fp8 else "plain"
        self.o_proj = Linear(self.num_heads * self.v_dim, {"o_proj": config.hidden_size}, fp8=fp8, precision=precision)
        self.indexer = Indexer(config, precision)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, backend: AttentionBackend, metadata: Metadata) -> Tensor:
        """x [T, hidden] after the input norm; cos, sin [T, rope/2] -> [T, hidden]."""
        q_latent, index_k, latent, k_pe = self.qkv_a(x).split(
            [self.q_lora_rank, self.index_key_dim, self.kv_lora_rank, self.rope_dim], dim=-1
        )
        backend.store(
            self.layer,
            metadata,
            self.kv_a_layernorm(latent),
            rope_interleaved(k_pe, cos, sin),
            self.indexer.keys(index_k, cos, sin),
        )
        q, index_q = self.q_b(self.q_a_layernorm(q_latent)).split(
            [self.q_dim, self.q_b.weight.shape[0] - self.q_dim], dim=-1
        )
        selection: list[Tensor | None] = [None] * len(metadata.groups)
        if backend.needs_scores(metadata):
            queries = self.indexer.queries(index_q, cos, sin)
            selection = backend.select(self.layer, metadata, queries, self.indexer.gates(x))
        q = q.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))
        q = torch.cat([q[..., : self.nope_dim], rope_interleaved(q[..., self.nope_dim :], cos, sin)], dim=-1)
        out = backend.attend(self.layer, metadata, q, self.w_kc, self.w_vc, selection)
        return self.o_proj(out.flatten(1))

    @property
    def w_kc(self) -> Tensor:
        """[H, nope, latent]: takes a query into the latent space."""
        return self.kv_b_proj[:, : self.nope_dim]

    @property
    def w_vc(self) -> Tensor:
        """[H, latent, v]: takes an attended latent to the head's value."""
        return self.kv_b_proj[:, self.nope_dim :].transpose(1, 2)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.qkv_a.targets(prefix)
        yield from self.q_a_layernorm.targets(f"{prefix}q_a_layernorm")
        yield from self.kv_a_layernorm.targets(f"{prefix}kv_a_layernorm")
        yield from self.q_b.targets(prefix)
        kv_b = self.kv_b_proj.data.flatten(0, 1)
        yield Target(f"{prefix}kv_b_proj.weight", tuple(kv_b.shape), kv_b, self.kv_b_kind)
        yield from self.o_proj.targets(prefix)
        yield from self.indexer.targets(f"{prefix}indexer.")
