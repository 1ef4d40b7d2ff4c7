"""The lightning indexer's own weights: key norm and head gates.

Its two projections run inside MLA's, which share their inputs; `kernels.mla_inputs` makes queries and keys of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.kernels.bf16_gemm import bf16_gemm
from baleen.model.layers import Precision, weight
from baleen.model.weights import Target

KEY_NORM_EPS = 1e-6  # fixed by the model, apart from rms_norm_eps


class Indexer(nn.Module):
    """Parameters, and the head gates of a step; `AttentionBackend.select` scores.

    A head is [rope | rest]: rope comes first here and last in MLA, and pairs dimension i with i + 32 (`rope_half`).
    gate_scale  H^-0.5 * D^-0.5, a factor of every gate
    """

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.k_norm_weight = weight(self.head_dim)
        self.k_norm_bias = weight(self.head_dim)
        # bfloat16 in the checkpoint even when the rest is FP8: a gate decides between near-equal tokens
        self.weights_proj = weight(self.num_heads, config.hidden_size, dtype=precision.dtype)
        self.gate_scale = self.num_heads**-0.5 * self.head_dim**-0.5

    def gates(self, x: Tensor) -> Tensor:
        """Hidden states [T, hidden] -> head weights [T, H] float32, not yet times `gate_scale`."""
        return bf16_gemm(x, self.weights_proj)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield Target(f"{prefix}k_norm.weight", (self.head_dim,), self.k_norm_weight.data, "plain")
        yield Target(f"{prefix}k_norm.bias", (self.head_dim,), self.k_norm_bias.data, "plain")
        proj = self.weights_proj
        yield Target(f"{prefix}weights_proj.weight", tuple(proj.shape), proj.data, "plain")
