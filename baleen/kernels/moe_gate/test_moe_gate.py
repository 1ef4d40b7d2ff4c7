"""moe_gate against a plain Python router and transformers' module."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter

from baleen.kernels.dispatch import available, find
from baleen.kernels.moe_gate import IMPLEMENTATIONS, moe_gate
from baleen.kernels.moe_gate.cases import CASES
from baleen.kernels.testing import Case, check, run_in_interpreter


def _route(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, factor: float, norm: bool, shared: int
) -> tuple[Tensor, Tensor]:
    num_experts = logits.shape[1]
    size = num_experts // n_group
    ids, weights = [], []
    # float32 sums, so that what ties there ties here.
    scores = logits.sigmoid() + bias
    for row, logit in zip(scores, logits.tolist(), strict=True):
        groups = []
        for group in range(n_group):
            best = row[group * size : (group + 1) * size].sort(descending=True).values[:2]
            groups.append((-best.sum().item(), group))
        kept = {group for _, group in sorted(groups)[:topk_group]}
        order = sorted((-row[e].item(), e) for e in range(num_experts) if e // size in kept)[:top_k]
        chosen = [expert for _, expert in order]
        p = [1 / (1 + math.exp(-logit[expert])) for expert in chosen]
        ids.append(chosen + [num_experts + i for i in range(shared)])
        weights.append([factor * x / (sum(p) if norm else 1.0) for x in p] + [1.0] * shared)
    columns = top_k + shared
    return torch.tensor(ids, dtype=torch.int64).view(-1, columns), torch.tensor(weights).view(-1, columns)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_plain_python(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _route)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_plain_python(implementation: str) -> None:
    for case in CASES:
        check(IMPLEMENTATIONS, implementation, case, _route, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """The tests of every implementation once more, where Triton interprets its kernels: that is chosen at import."""
    run_in_interpreter(__file__, "triton and not interpreter")


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_nan_is_chosen_first_and_shows_in_the_weights(implementation: str) -> None:
    """Of its own token only."""
    route = find(IMPLEMENTATIONS, implementation, "moe_gate")
    assert route is not None
    logits = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    logits[0, 21] = torch.nan
    ids, weights = route(logits, torch.zeros(32), 8, 2, 4, 1.0, True, 1)
    assert int(ids[0, 0]) == 21
    assert weights.isnan().tolist() == [[True] * 4 + [False], [False] * 5]
    assert ids[0].unique().numel() == 5
    assert (ids[0, :4] // 4).unique().numel() <= 2


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_rows_of_a_wider_tensor(implementation: str) -> None:
    route = find(IMPLEMENTATIONS, implementation, "moe_gate")
    assert route is not None
    wide = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(32)
    for rows in (wide[:, 3:35], wide[:, :32].t().contiguous().t()):
        got, expected = (route(x, bias, 4, 2, 6, 2.5, True) for x in (rows, rows.contiguous()))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_equals_transformers() -> None:
    config = DeepseekV32Config(
        hidden_size=32, n_routed_experts=32, num_experts_per_tok=6, n_group=8, topk_group=3, routed_scaling_factor=2.5
    )
    router = DeepseekV32TopkRouter(config)
    router.weight.data = torch.randn(32, 32)
    router.e_score_correction_bias.data = torch.randn(32) * 0.3
    logits, oracle_weights, oracle_ids = router(torch.randn(50, 32))
    ids, weights = moe_gate(logits.detach(), router.e_score_correction_bias, 8, 3, 6, 2.5, config.norm_topk_prob)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    order, oracle_order = ids.argsort(1), oracle_ids.argsort(1)
    assert torch.equal(ids.gather(1, order), oracle_ids.gather(1, oracle_order))
    torch.testing.assert_close(weights.gather(1, order), oracle_weights.detach().gather(1, oracle_order))


def test_a_tie_of_the_last_chosen_with_the_first_dropped_goes_to_the_lower_id() -> None:
    rows, experts, top_k = 100, 64, 6
    logits = torch.stack([torch.randperm(experts) for _ in range(rows)]).float() / 8
    order = logits.argsort(1, descending=True)
    last, dropped = order[:, top_k - 1 : top_k], order[:, top_k : top_k + 1]
    logits.scatter_(1, dropped, logits.gather(1, last))
    ids, _ = moe_gate(logits, torch.zeros(experts), 1, 1, top_k, 1.0, True)
    assert torch.equal(ids[:, -1:], torch.minimum(last, dropped))


def test_excluded_groups_lose_even_to_negative_scores() -> None:
    """Group 0 has the best pair; its third expert scores -4, below everything in group 1."""
    logits = torch.tensor([[5.0, 5.0, -20.0, -20.0, 0.0, 0.0, 0.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, -4.0, -5.0, 0.0, 0.0, 0.0, 0.0])
    ids, _ = moe_gate(logits, bias, 2, 1, 3, 1.0, True)
    assert ids.tolist() == [[0, 1, 2]]


def test_probabilities_that_all_underflow_weigh_nothing() -> None:
    _, weights = moe_gate(torch.full((1, 4), -200.0), torch.zeros(4), 1, 1, 2, 2.5, True)
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("n_group", "topk_group", "top_k"), [(3, 1, 1), (4, 5, 1), (4, 2, 5)])
def test_impossible_choices_are_refused(n_group: int, topk_group: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="cannot choose"):
        moe_gate(torch.zeros(1, 8), torch.zeros(8), n_group, topk_group, top_k, 1.0, True)
