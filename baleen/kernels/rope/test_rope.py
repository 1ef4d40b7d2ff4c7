"""The rotations against complex numbers in plain Python and transformers; the tables against transformers."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from baleen.kernels.dispatch import available
from baleen.kernels.rope import IMPLEMENTATIONS, rope_half, rope_interleaved, rope_table, yarn_table
from baleen.kernels.rope.cases import CASES
from baleen.kernels.testing import Case, check

YARN = {"factor": 40.0, "original_max_positions": 4096}


def _by_hand(x: Tensor, cos: Tensor, sin: Tensor, pair: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """pair: (i, dim) -> the two elements that frequency i turns."""
    out, dim = x.double().clone(), x.shape[-1]
    for index in product(*(range(n) for n in x.shape[:-1])):
        for i in range(dim // 2):
            first, second = pair(i, dim)
            turn = complex(cos[index[0], i].item(), sin[index[0], i].item())
            turned = complex(x[index][first].item(), x[index][second].item()) * turn
            out[index][first], out[index][second] = turned.real, turned.imag
    return out


ORACLES = {
    "rope_interleaved": lambda x, cos, sin: _by_hand(x, cos, sin, lambda i, dim: (2 * i, 2 * i + 1)),
    "rope_half": lambda x, cos, sin: _by_hand(x, cos, sin, lambda i, dim: (i, i + dim // 2)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_complex_numbers(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function])


@pytest.mark.parametrize("rope", [rope_interleaved, rope_half])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays_and_zero_angle_is_identity(rope: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(4, 2, 64).to(dtype)
    out = rope(x, torch.ones(4, 32), torch.zeros(4, 32))
    assert out.dtype == dtype
    assert torch.equal(out, x)


@pytest.mark.parametrize("rope", [rope_interleaved, rope_half])
def test_scores_depend_on_the_distance_only(rope: Callable[..., Tensor]) -> None:
    cos, sin = yarn_table(256, 64, 10000.0, **YARN)
    q, k = torch.randn(1, 64), torch.randn(1, 64)

    def score(i: int, j: int) -> float:
        rotated_q, rotated_k = rope(q, cos[i : i + 1], sin[i : i + 1]), rope(k, cos[j : j + 1], sin[j : j + 1])
        return float((rotated_q * rotated_k).sum())

    assert score(30, 7) == pytest.approx(score(223, 200), abs=1e-4)


def test_rotations_equal_transformers() -> None:
    angles = torch.rand(9, 32) * 50
    cos, sin = angles.cos(), angles.sin()
    doubled = (torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    q, k = torch.randn(1, 9, 4, 64), torch.randn(1, 9, 1, 64)
    half_q, half_k = apply_rotary_pos_emb(q, k, *doubled, unsqueeze_dim=2)
    torch.testing.assert_close(rope_half(q[0], cos, sin), half_q[0])
    torch.testing.assert_close(rope_half(k[0, :, 0], cos, sin), half_k[0, :, 0])
    # transformers returns the interleaved rotation with even elements first, odd ones after.
    pairs_q, _ = apply_rotary_pos_emb_interleave(q, k, *doubled, unsqueeze_dim=2)
    ours = rope_interleaved(q[0], cos, sin)
    torch.testing.assert_close(torch.cat((ours[..., 0::2], ours[..., 1::2]), -1), pairs_q[0])


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 2.0, "mscale": 0.7,
         "mscale_all_dim": 1.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("rope_dim", [64, 16])
def test_tables_equal_transformers(scaling: dict[str, float] | None, rope_dim: int) -> None:
    theta = 10000.0
    parameters = {"rope_type": "yarn" if scaling else "default", "rope_theta": theta, **(scaling or {})}
    config = DeepseekV32Config(qk_rope_head_dim=rope_dim, max_position_embeddings=4096, rope_parameters=parameters)
    positions = torch.arange(2048)[None]
    oracle_cos, oracle_sin = DeepseekV32RotaryEmbedding(config)(torch.zeros(1), positions)
    if scaling is None:
        cos, sin = rope_table(2048, rope_dim, theta)
    else:
        renamed = {k: v for k, v in scaling.items() if k != "original_max_position_embeddings"}
        cos, sin = yarn_table(
            2048, rope_dim, theta, original_max_positions=int(scaling["original_max_position_embeddings"]), **renamed
        )
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (2048, rope_dim // 2)
    torch.testing.assert_close(cos, oracle_cos[0, :, : rope_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, oracle_sin[0, :, : rope_dim // 2], rtol=0, atol=1e-6)


def test_yarn_keeps_fast_and_divides_slow_frequencies() -> None:
    """The released model: frequencies 0..10 stay, 23..31 are divided by 40, between them a ramp."""
    cos, sin = yarn_table(2, 64, 10000.0, **YARN)
    for i in range(32):
        frequency = cmath.phase(complex(cos[1, i].item(), sin[1, i].item()))
        plain = 10000 ** (-2 * i / 64)
        kept = 1 - min(max((i - 10) / (23 - 10), 0), 1)
        assert frequency == pytest.approx(plain * kept + plain / 40 * (1 - kept), rel=1e-4)


def test_the_amplitude_is_the_ratio_of_the_attention_factors() -> None:
    cos, _ = yarn_table(1, 64, 10000.0, **YARN, mscale=1.0, mscale_all_dim=0.0)
    assert cos[0, 0].item() == pytest.approx(0.1 * math.log(40) + 1, rel=1e-6)
