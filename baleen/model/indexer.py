"""The lightning indexer's own weights: key norm and head gates.

Its two projections run inside MLA's, which share their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from baleen.config import ModelConfig
from baleen.kernels.rope import rope_half
from baleen.model.layers import Linear, Precision, weight
from baleen.model.weights import Target

KEY_NORM_EPS = 1e-6  # fixed by the model, apart from rms_norm_eps


class Indexer(nn.Module):
    """Index queries, keys and head gates of a step; `AttentionBackend.select` scores them.

    A head is [rope | rest]: rope comes first here and last in MLA, and pairs dimension i with i + 32 (`rope_half`).
    """

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.k_norm_weight = weight(self.head_dim)
        self.k_norm_bias = weight(self.head_dim)
        # bfloat16 in the checkpoint even when the rest is FP8: a gate decides between near-equal tokens
        self.weights_proj = Linear(config.hidden_size, {"weights_proj": self.num_heads}, fp8=False, precision=precision)
        self.gate_scale = self.num_heads**-0.5 * self.head_dim**-0.5

    def keys(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """wk's output [T, D] -> index keys [T, D]."""
        k = layer_norm(k.float(), (self.head_dim,), self.k_norm_weight, self.k_norm_bias, KEY_NORM_EPS).to(k.dtype)
        return self._rope(k, cos, sin)

    def queries(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """wq_b's output [T, H*D] -> index queries [T, H, D]."""
        return self._rope(q.unflatten(-1, (self.num_heads, self.head_dim)), cos, sin)

    def gates(self, x: Tensor) -> Tensor:
        """Hidden states [T, hidden] -> head weights [T, H] float32, times H^-0.5 * D^-0.5."""
        return self.weights_proj(x).float() * self.gate_scale

    def _rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([rope_half(x[..., : self.rope_dim], cos, sin), x[..., self.rope_dim :]], dim=-1)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}k_norm.weight", (self.head_dim,), self.k_norm_weight.data, "plain")
        yield Target(f"{prefix}k_norm.bias", (self.head_dim,), self.k_norm_bias.data, "plain")
        yield from self.weights_proj.targets(prefix)
