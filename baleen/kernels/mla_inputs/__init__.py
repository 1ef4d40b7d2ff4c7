"""What MLA does between its projections and the attention, each in one pass: keys into the caches, queries ready.

Imports: kernels.{dispatch,fp8_quant,hadamard,kv_store,pdl,rms_norm,rope}.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.mla_inputs.triton_kernel:store_keys",
    "reference": "baleen.kernels.mla_inputs.reference:store_keys",
}

_store_keys = Op(IMPLEMENTATIONS)
_index_queries = Op(IMPLEMENTATIONS, "index_queries")
_rope_queries = Op(IMPLEMENTATIONS, "rope_queries")


def store_keys(
    latent: Tensor,
    k_pe: Tensor,
    index_k: Tensor,
    latent_weight: Tensor,
    latent_eps: float,
    key_weight: Tensor,
    key_bias: Tensor,
    key_eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    latent_cache: tuple[Tensor, ...],
    index_cache: tuple[Tensor, ...],
) -> None:
    """Norms and rotates the tokens' keys and writes them to their slots.

    latent        [T, Dl], k_pe [T, Dr], index_k [T, D]: float32 or bfloat16, one dtype; rows of any stride, as slices
                  of one projection's output have
    latent_weight [Dl], of RMSNorm(latent); key_weight, key_bias [D], of LayerNorm(index_k): float32 or bfloat16
    cos, sin      [T, Dr/2] float32, at the tokens' positions: k_pe as rope_interleaved, the first Dr of the normed
                  index key as rope_half
    slots         [T] int64, as kv_store's
    latent_cache  values e4m3 [N, Dl], scales float32 [N, Dl/128], rope bfloat16 [N, Dr], as kv_store.store_latent_fp8;
                  or one tensor [N, Dl + Dr] float32 or bfloat16
    index_cache   keys e4m3 [P, 64, D], scales float32 [P, 64], as kv_store.store_index_fp8: the key after a Hadamard
                  transform; or one tensor [N, D] float32 or bfloat16: without it
    Error:        rounding. Norm, rotation and transform each round to the inputs' dtype, as the single ops do.
    Cost:         reads and writes each key once.
    Raises:       ValueError if an index key is wider than the 128 of one scale.
    """
    _store_keys(
        latent,
        k_pe,
        index_k,
        latent_weight,
        latent_eps,
        key_weight,
        key_bias,
        key_eps,
        cos,
        sin,
        slots,
        latent_cache,
        index_cache,
    )


def index_queries(q: Tensor, gates: Tensor, gate_scale: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The indexer's queries as index_logits takes them: rotated, transformed, quantised, their scale in the weights.

    q        [T, Hi, D] float32 or bfloat16, any strides; its first Dr dims are rotated as rope_half
    gates    [T, Hi] float32 or bfloat16, any strides
    cos,sin  [T, Dr/2] float32
    returns  (e4m3 [T, Hi, D], weights float32 [T, Hi] = gates * gate_scale * the query's scale)
    Error:   rounding. Rotation and Hadamard transform each round to q.dtype, as the single ops do.
    Cost:    reads q once, writes half as much.
    Raises:  ValueError if D is over the 128 of one scale, or no power of two.
    """
    result: tuple[Tensor, Tensor] = _index_queries(q, gates, gate_scale, cos, sin)
    return result


def rope_queries(q: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = rope_interleaved(q, cos, sin).

    q        [T, H, Dr] float32 or bfloat16, any strides (the end of wider heads)
    cos,sin  [T, Dr/2] float32
    out      [T, H, Dr] of q's dtype, any strides; may be q itself, but may not overlap it otherwise
    Error:   rounding.     Cost: reads and writes q once.
    """
    _rope_queries(q, cos, sin, out)
