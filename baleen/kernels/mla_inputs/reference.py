"""The inputs of MLA as the single ops, one after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from baleen.kernels.fp8_quant.reference import BLOCK, quantize_1x128
from baleen.kernels.hadamard.reference import hadamard
from baleen.kernels.kv_store.reference import store_index_fp8, store_latent_fp8, store_rows
from baleen.kernels.rms_norm.reference import rms_norm
from baleen.kernels.rope.reference import rope_half, rope_interleaved

# Of what lies between two of an index query's operations, for a chunk of tokens: more takes as long in page faults as
# in arithmetic.
SCRATCH_BYTES = 2 << 20


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
    latent = rms_norm(latent, latent_weight, latent_eps)
    k_pe = rope_interleaved(k_pe, cos, sin)
    if len(latent_cache) == 3:
        store_latent_fp8(*latent_cache, slots, latent, k_pe)
    else:
        (rows,) = latent_cache
        store_rows(rows[:, : latent.shape[1]], slots, latent)
        store_rows(rows[:, latent.shape[1] :], slots, k_pe)

    normed = layer_norm(index_k.float(), index_k.shape[-1:], key_weight.float(), key_bias.float(), key_eps)
    key = _rotate_first(normed.to(index_k.dtype), cos, sin)
    if len(index_cache) == 2:
        store_index_fp8(*index_cache, slots, hadamard(key))
    else:
        (keys,) = index_cache
        store_rows(keys, slots, key)


def index_queries(q: Tensor, gates: Tensor, gate_scale: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if q.shape[-1] > BLOCK:
        raise ValueError(f"mla_inputs: index queries are {q.shape[-1]} wide, more than the {BLOCK} of one scale")
    step = max(SCRATCH_BYTES // (4 * math.prod(q.shape[1:])), 1)
    if q.shape[0] <= step:
        values, scale = quantize_1x128(hadamard(_rotate_first(q, cos, sin)))
    else:
        values = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
        scale = torch.empty(*q.shape[:-1], 1, dtype=torch.float32, device=q.device)
        for first in range(0, q.shape[0], step):
            rows = slice(first, first + step)
            values[rows], scale[rows] = quantize_1x128(hadamard(_rotate_first(q[rows], cos[rows], sin[rows])))
    return values, gates.float() * gate_scale * scale.squeeze(-1)


def rope_queries(q: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    out.copy_(rope_interleaved(q, cos, sin))


def _rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope_half of the first dims, as many as the table has; the others stay."""
    dim = 2 * cos.shape[1]
    return torch.cat([rope_half(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
