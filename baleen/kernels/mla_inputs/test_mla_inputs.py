"""The inputs of MLA token by token in float64, rounded where the contract says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available, find
from baleen.kernels.mla_inputs import IMPLEMENTATIONS, index_queries, store_keys
from baleen.kernels.mla_inputs.cases import CASES, check_rounded, empty_caches
from baleen.kernels.testing import Case, run_in_interpreter


def _sylvester(dim: int) -> Tensor:
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return torch.from_numpy(matrix / np.sqrt(dim))


def _turned(x: Tensor, first: slice, second: slice, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] with the elements of two slices turned in pairs by the angles of cos and sin [n], rounded as x."""
    out = x.double().clone()
    a, b = out[..., first].clone(), out[..., second].clone()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out.to(x.dtype)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x, slice(0, None, 2), slice(1, None, 2), cos.double(), sin.double())


def _half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part = len(cos)
    return _turned(x, slice(0, part), slice(part, 2 * part), cos.double(), sin.double())


def _spread(x: Tensor) -> Tensor:
    return (x.double() @ _sylvester(x.shape[-1])).to(x.dtype)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K], K at most 128 -> values, scale [...]."""
    amax = x.double().abs().amax(-1).clamp_min(float(np.float32(1e-4)))
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    return (x.double() / scale[..., None]).float().to(torch.float8_e4m3fn), scale.float()


def _store_keys(
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
    for t, slot in enumerate(slots.tolist()):
        x = latent[t].double()
        x = (x / (x.square().mean() + latent_eps).sqrt() * latent_weight.double()).to(latent.dtype)
        pe = _interleaved(k_pe[t], cos[t], sin[t])
        if len(latent_cache) == 3:
            values, scales, rope = latent_cache
            for block, part in enumerate(x.split(128)):
                quantized, scale = _quantized(part)
                values[slot, 128 * block : 128 * (block + 1)].copy_(quantized)
                scales[slot, block] = scale
            rope[slot] = pe
        else:
            latent_cache[0][slot] = torch.cat((x, pe))
        k = index_k[t].double()
        k = (k - k.mean()) / (k.var(correction=0) + key_eps).sqrt() * key_weight.double() + key_bias.double()
        k = _half(k.to(index_k.dtype), cos[t], sin[t])
        if len(index_cache) == 2:
            quantized, index_cache[1][slot // 64, slot % 64] = _quantized(_spread(k))
            index_cache[0][slot // 64, slot % 64].copy_(quantized)
        else:
            index_cache[0][slot] = k


def _index_queries(q: Tensor, gates: Tensor, gate_scale: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    values, weights = torch.zeros(q.shape).to(torch.float8_e4m3fn), torch.zeros(q.shape[:2])
    for t in range(len(q)):
        quantized, scale = _quantized(_spread(_half(q[t], cos[t], sin[t])))
        values[t].copy_(quantized)
        weights[t] = gates[t].double() * gate_scale * scale
    return values, weights


def _rope_queries(q: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    for t in range(len(q)):
        out[t] = _interleaved(q[t], cos[t], sin[t])


ORACLES = {"store_keys": _store_keys, "index_queries": _index_queries, "rope_queries": _rope_queries}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_float64(implementation: str, case: Case) -> None:
    check_rounded(implementation, case, ORACLES[case.function])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_float64(implementation: str) -> None:
    for case in CASES:
        check_rounded(implementation, case, ORACLES[case.function], "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The float32 cases once more, where Triton interprets its kernels: that is chosen at import. It rounds to bfloat16
    and FP8 otherwise than a GPU."""
    run_in_interpreter(__file__, "triton and float32 and not bfloat16 and not float8")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_a_bad_value_spoils_its_own_vector_only(implementation: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q, gates = torch.randn(2, 32, 128, device=device).bfloat16(), torch.ones(2, 32, device=device)
    cos, sin = torch.ones(2, 32, device=device), torch.zeros(2, 32, device=device)
    function = find(IMPLEMENTATIONS, implementation, "index_queries")
    assert function is not None
    good_values, good_weights = function(q, gates, 1.0, cos, sin)
    q[1, 3, 100] = float("nan")
    values, weights = function(q, gates, 1.0, cos, sin)
    products = values.float() * weights[..., None]
    assert bool(products[1, 3].isnan().all())
    products[1, 3] = (good_values.float() * good_weights[..., None])[1, 3]
    assert torch.equal(products, good_values.float() * good_weights[..., None])


def test_scores_need_the_same_transform_on_both_sides() -> None:
    """The FP8 index key of a token, against a query of another: the plain product of the rotated vectors, almost."""
    g = torch.Generator().manual_seed(5)
    q, key = torch.randn(1, 16, 128, generator=g), torch.randn(1, 128, generator=g)
    cos, sin = (torch.rand(2, 32, generator=g) * 9).cos(), torch.zeros(2, 32)
    weight, bias = torch.ones(128), torch.zeros(128)
    latent, pe = torch.zeros(1, 512), torch.zeros(1, 64)
    stored = []
    for dtype in (torch.float8_e4m3fn, torch.float32):
        caches = empty_caches(512, 64, 128, torch.float32, dtype)
        norms = (torch.ones(512), 1e-6, weight, bias, 1e-6)
        store_keys(latent, pe, key, *norms, cos[:1], sin[:1], torch.tensor([70]), *caches)
        stored.append(caches[1])
    (keys, scales), (rows,) = stored
    values, weights = index_queries(q, torch.ones(1, 16), 1.0, cos[1:], sin[1:])
    scores = (values[0].float() @ keys[1, 6].float()) * weights[0] * scales[1, 6]
    turned = torch.cat((q[0, :, :64] * torch.cat((cos[1], cos[1])), q[0, :, 64:]), 1)
    torch.testing.assert_close(scores, turned @ rows[70], rtol=0.1, atol=1.0)


def test_index_queries_wider_than_a_scale_are_refused() -> None:
    q = torch.zeros(1, 2, 256)
    with pytest.raises(ValueError, match="256 wide"):
        index_queries(q, torch.zeros(1, 2), 1.0, torch.ones(1, 32), torch.zeros(1, 32))
