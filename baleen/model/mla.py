"""Multi-head latent attention with DeepSeek Sparse Attention: projections on both sides of the attention backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from baleen.attention.backend import AttentionBackend, Metadata
from baleen.attention.kv_pool import KeyNorms
from baleen.config import ModelConfig
from baleen.model.indexer import KEY_NORM_EPS, Indexer
from baleen.model.layers import Activation, Linear, Precision, RMSNorm, weight
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
        # [H, nope + v, latent]; its halves are used per head and never quantised at run time
        self.kv_b_proj = weight(self.num_heads, self.nope_dim + self.v_dim, self.kv_lora_rank, dtype=precision.dtype)
        self.kv_b_kind: Literal["linear", "plain"] = "linear" if fp8 else "plain"
        self.o_proj = Linear(self.num_heads * self.v_dim, {"o_proj": config.hidden_size}, fp8=fp8, precision=precision)
        self.indexer = Indexer(config, precision)

    @property
    def takes_fp8(self) -> bool:
        """True if the input's FP8 form is read."""
        return self.qkv_a.takes_fp8

    def forward(self, x: Activation, cos: Tensor, sin: Tensor, backend: AttentionBackend, metadata: Metadata) -> Tensor:
        """x [T, hidden] after the input norm, plain and as `takes_fp8` says; cos, sin [T, rope/2] -> [T, hidden]."""
        beside = metadata.beside
        assert x.plain is not None, "the indexer's gates are not FP8"
        with beside.start():
            gates = self.indexer.gates(x.plain) if backend.needs_scores(metadata) else None
        q_latent, index_k, latent, k_pe = self.qkv_a(x).split(
            [self.q_lora_rank, self.index_key_dim, self.kv_lora_rank, self.rope_dim], dim=-1
        )
        with beside.start():
            backend.store(self.layer, metadata, latent, k_pe, index_k, self.key_norms, cos, sin)
        q, index_q = self.q_b(self.q_a_layernorm(q_latent, self.q_b)).split(
            [self.q_dim, self.q_b.weight.shape[0] - self.q_dim], dim=-1
        )
        q = q.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))
        beside.join()
        with beside.start():
            queries = backend.queries(metadata, q, cos, sin, self.kv_b_proj)
        selection: list[Tensor | None] = [None] * len(metadata.groups)
        if gates is not None:
            index_q = index_q.unflatten(-1, (self.indexer.num_heads, self.indexer.head_dim))
            scored_by = backend.index_queries(index_q, gates, self.indexer.gate_scale, cos, sin)
            selection = backend.select(self.layer, metadata, *scored_by)
        beside.join()
        inputs = self.layer, metadata, queries, self.kv_b_proj, selection
        if self.o_proj.takes_fp8:
            return self.o_proj(Activation(None, backend.attend_quantized(*inputs)))
        return self.o_proj(Activation(backend.attend(*inputs).flatten(1)))

    @property
    def key_norms(self) -> KeyNorms:
        """What a step's keys go through on their way into the cache."""
        return KeyNorms(
            self.kv_a_layernorm.weight,
            self.kv_a_layernorm.eps,
            self.indexer.k_norm_weight,
            self.indexer.k_norm_bias,
            KEY_NORM_EPS,
        )

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.qkv_a.targets(prefix)
        yield from self.q_a_layernorm.targets(f"{prefix}q_a_layernorm")
        yield from self.kv_a_layernorm.targets(f"{prefix}kv_a_layernorm")
        yield from self.q_b.targets(prefix)
        kv_b = self.kv_b_proj.data.flatten(0, 1)
        yield Target(f"{prefix}kv_b_proj.weight", tuple(kv_b.shape), kv_b, self.kv_b_kind)
        yield from self.o_proj.targets(prefix)
        yield from self.indexer.targets(f"{prefix}indexer.")
