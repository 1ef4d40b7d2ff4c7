"""DeepseekV32ForCausalLM, from token ids to logits.

T is the number of tokens of a step, all requests together. Nothing here knows of ranks, requests or pages: the
attention backend does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from baleen.attention.backend import AttentionBackend, Metadata
from baleen.config import ModelConfig
from baleen.kernels.bf16_gemm import bf16_gemm
from baleen.kernels.lm_head import lm_head
from baleen.kernels.rope import rope_table, yarn_table
from baleen.model.layers import Embedding, Linear, Precision, RMSNorm
from baleen.model.mla import MlaAttention
from baleen.model.moe import Mlp, MoE
from baleen.model.weights import Target


class Stream(NamedTuple):
    """What goes from layer to layer. x, residual [T, hidden], their sum the hidden state; cos, sin [T, rope/2]."""

    x: Tensor
    residual: Tensor
    cos: Tensor
    sin: Tensor


class DecoderLayer(nn.Module):
    """norm, attention, norm, MLP or MoE; the residual is carried unnormalised beside the hidden states."""

    def __init__(self, config: ModelConfig, layer: int, precision: Precision, *, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MlaAttention(config, layer, precision)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, precision) if moe else Mlp(config, config.intermediate_size, precision)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        backend: AttentionBackend,
        metadata: Metadata,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> the same pair for the next layer; x + residual is the hidden state. The first
        layer has no residual.
        """
        normed, residual = self.input_layernorm.add(x, residual, fp8=self.self_attn.takes_fp8)
        x = self.self_attn(normed, cos, sin, backend, metadata)
        normed, residual = self.post_attention_layernorm.add(x, residual, fp8=self.mlp.takes_fp8)
        return self.mlp(normed), residual

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.input_layernorm.targets(f"{prefix}input_layernorm")
        yield from self.self_attn.targets(f"{prefix}self_attn.")
        yield from self.post_attention_layernorm.targets(f"{prefix}post_attention_layernorm")
        yield from self.mlp.targets(f"{prefix}mlp.")


class MtpLayer(nn.Module):
    """The multi-token-prediction layer's weights.

    Embedding and head are the model's own, so the checkpoint's copies are not kept.
    """

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, {"eh_proj": config.hidden_size}, fp8=False, precision=precision)
        self.layer = DecoderLayer(config, 0, precision, moe=True)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.enorm.targets(f"{prefix}enorm")
        yield from self.hnorm.targets(f"{prefix}hnorm")
        yield from self.eh_proj.targets(prefix)
        yield from self.layer.targets(prefix)
        yield from self.norm.targets(f"{prefix}shared_head.norm")


class DeepseekV32ForCausalLM(nn.Module):
    """The whole network, on torch's default device. Parameters are empty until `weights.load_weights` fills them."""

    cos: Tensor
    sin: Tensor
    # what a checkpoint may hold and the model leaves: MTP's copies of embedding and head, buffers of old exports
    ignored = ("*.shared_head.head.weight", "model.layers.*.embed_tokens.weight", "*.rotary_emb.inv_freq")

    def __init__(self, config: ModelConfig, precision: Precision, max_positions: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, precision.dtype)
        layers = [
            DecoderLayer(config, i, precision, moe=config.is_moe_layer(i)) for i in range(config.num_hidden_layers)
        ]
        self.layers = cast("Sequence[DecoderLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Embedding(config.vocab_size, config.hidden_size, precision.dtype)
        mtp = (MtpLayer(config, precision) for _ in range(config.num_nextn_predict_layers))
        self.mtp = cast("Sequence[MtpLayer]", nn.ModuleList(mtp))
        with torch.device("cpu"):  # the same table everywhere
            cos, sin = _rope_tables(config, max_positions)
        self.register_buffer("cos", cos.to(self.lm_head.weight.device), persistent=False)
        self.register_buffer("sin", sin.to(self.lm_head.weight.device), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, backend: AttentionBackend, metadata: Metadata) -> Tensor:
        """ids, positions [T] int64 -> hidden states after the final norm [T, hidden]."""
        return self.finish(self.start(ids, positions, backend, metadata), backend, metadata)

    def start(self, ids: Tensor, positions: Tensor, backend: AttentionBackend, metadata: Metadata) -> Stream:
        """`forward` up to the end of the first layer."""
        with metadata.beside.start():
            cos, sin = self.cos[positions], self.sin[positions]
        x = self.embed_tokens(ids)
        x, residual = self.layers[0](x, None, cos, sin, backend, metadata)
        return Stream(x, residual, cos, sin)

    def finish(self, stream: Stream, backend: AttentionBackend, metadata: Metadata) -> Tensor:
        """The rest of `forward`."""
        x, residual, cos, sin = stream
        for layer in islice(self.layers, 1, None):
            x, residual = layer(x, residual, cos, sin, backend, metadata)
        normed = self.norm.add(x, residual, fp8=False)[0].plain
        assert normed is not None
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] -> [R, vocab] float32."""
        return bf16_gemm(hidden, self.lm_head.weight)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [R, hidden] -> logits [R, vocab] float32, and the likeliest ids [R] int64, -1 where there is none."""
        return lm_head(hidden, self.lm_head.weight)

    def drop_mtp(self) -> None:
        """The checkpoint has no MTP layer: free what was kept for it."""
        self.mtp = cast("Sequence[MtpLayer]", nn.ModuleList())

    def checkpoint_tensors(self) -> Iterator[Target]:
        """Where each tensor of the checkpoint goes; the MTP layers form one optional group."""
        yield from self.embed_tokens.targets("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            yield from layer.targets(f"model.layers.{i}.")
        yield from self.norm.targets("model.norm")
        yield from self.lm_head.targets("lm_head")
        for i, mtp in enumerate(self.mtp):
            for target in mtp.targets(f"model.layers.{len(self.layers) + i}."):
                yield replace(target, optional=True)


def _rope_tables(config: ModelConfig, max_positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin [max_positions, rope/2] float32; one table serves MLA and indexer."""
    rope = config.rope
    if rope is None:
        return rope_table(max_positions, config.qk_rope_head_dim, config.rope_theta)
    return yarn_table(
        max_positions,
        config.qk_rope_head_dim,
        config.rope_theta,
        factor=rope.factor,
        original_max_positions=rope.original_max_position_embeddings,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
    )
