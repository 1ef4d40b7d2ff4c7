"""What the tests of this folder share: a small model config, and keys that norms and rope leave as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.attention.kv_pool import KeyNorms
from baleen.config import ModelConfig, RopeScaling


def latents(*shape: int) -> Tensor:
    """Random rows that RMSNorm without a weight keeps."""
    rows = torch.randn(shape)
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def index_keys(*shape: int) -> Tensor:
    """Random rows that LayerNorm without weights keeps."""
    rows = torch.randn(shape)
    rows -= rows.mean(-1, keepdim=True)
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def no_norms(latent: int, key: int) -> KeyNorms:
    """Norms without weights, of so many dims."""
    return KeyNorms(torch.ones(latent), 0.0, torch.ones(key), torch.zeros(key), 0.0)


def no_rope(num_tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin that turn nothing."""
    return torch.ones(num_tokens, dim // 2), torch.zeros(num_tokens, dim // 2)


def small_model() -> ModelConfig:
    """The family in the small: every field set, yarn on, `index_topk` below the contexts of the tests."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=3,
        num_nextn_predict_layers=0,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_ids=(1,),
        tie_word_embeddings=False,
        dtype="float32",
        rope=RopeScaling(factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
        quantization=None,
    )
