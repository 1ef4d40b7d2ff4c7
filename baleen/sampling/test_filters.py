"""The filters against the logits warpers of transformers, and by hand where those leave things open."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baleen.sampling import filters

VOCAB_SIZE = 500


def weights_of(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.amax(dim=1, keepdim=True)).exp()


def keep(weights: torch.Tensor, top_k: int, top_p: float, min_p: float, width: int) -> filters.Kept:
    rows = len(weights)
    return filters.keep(
        weights,
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), min_p, dtype=torch.float64),
        width,
    )


def probabilities(kept: filters.Kept, vocab_size: int) -> torch.Tensor:
    masses = kept.weights.double()
    spread = torch.zeros(len(masses), vocab_size, dtype=torch.float64)
    return spread.scatter_(1, kept.ids, masses / masses.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (1, 1.0, 0.0),
        (7, 1.0, 0.0),
        (300, 1.0, 0.0),
        (VOCAB_SIZE, 0.1, 0.0),
        (VOCAB_SIZE, 0.95, 0.0),
        (VOCAB_SIZE, 1.0, 0.1),
        (40, 0.8, 0.0),
        (40, 0.99, 0.05),
        (VOCAB_SIZE, 0.9, 0.2),
        (VOCAB_SIZE, 0.0, 0.0),
    ],
)
def test_same_distribution_as_transformers(spread: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(50, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * spread
    warpers = LogitsProcessorList([TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)])
    warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(torch.zeros(50, 1, dtype=torch.int64), logits.clone()).double().softmax(dim=1)
    got = probabilities(keep(weights_of(logits), top_k, top_p, min_p, VOCAB_SIZE), VOCAB_SIZE)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def test_smallest_set_whose_mass_reaches_top_p() -> None:
    """Masses 0.5, 0.25, 0.125, 0.125 are exact, so are the places where one more token is needed."""
    weights = torch.tensor([[0.25, 1.0, 0.25, 0.5]])
    for top_p, ids in (
        (0.5, [1]),
        (0.51, [1, 3]),
        (0.75, [1, 3]),
        (0.8, [0, 1, 3]),
        (0.875, [0, 1, 3]),
        (0.9, [0, 1, 2, 3]),
    ):
        kept = keep(weights, 4, top_p, 0.0, 4)
        assert sorted(kept.ids[kept.weights > 0].tolist()) == ids, top_p


def test_ten_equal_tokens_at_nine_tenths_are_nine() -> None:
    kept = keep(torch.ones(1, 10), 10, 0.9, 0.0, 10)
    assert kept.ids[kept.weights > 0].tolist() == list(range(9))


def test_equal_weights_are_kept_by_lowest_id_at_any_width() -> None:
    weights = torch.tensor([[0.5, 1.0, 0.5, 0.5, 1.0, 0.5]])
    for width in (3, 4, 6):
        kept = keep(weights, 3, 1.0, 0.0, width)
        assert kept.ids[kept.weights > 0].tolist() == [1, 4, 0]


def test_min_p_keeps_what_reaches_it_exactly() -> None:
    weights = torch.tensor([[0.25, 1.0, 0.5, 0.249]])
    kept = keep(weights, 4, 1.0, 0.25, 4)
    assert sorted(kept.ids[kept.weights > 0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("top_k", "top_p"), [(VOCAB_SIZE, 0.3), (VOCAB_SIZE, 0.9), (20, 0.9), (60, 0.5)])
def test_a_narrow_ranking_is_either_incomplete_or_the_same(top_k: int, top_p: float) -> None:
    logits = torch.randn(60, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    logits *= torch.linspace(0.1, 8, 60)[:, None]
    weights = weights_of(logits)
    whole = probabilities(keep(weights, top_k, top_p, 0.01, VOCAB_SIZE), VOCAB_SIZE)
    narrow = keep(weights, top_k, top_p, 0.01, 50)
    got = probabilities(narrow, VOCAB_SIZE)
    assert torch.equal(got[narrow.complete], whole[narrow.complete])
    num_nucleus = (whole > 0).sum(dim=1)
    if top_k == VOCAB_SIZE:
        assert 0 < int(narrow.complete.sum()) < 60
        assert int(num_nucleus[~narrow.complete].max()) > 50
    else:
        assert bool(narrow.complete.all()) == (top_k <= 50)


def test_weights_are_exact_at_the_largest_vocabulary() -> None:
    """All weights 1: the sum and the sort keys are as large as they get."""
    size = filters.MAX_VOCAB_SIZE
    kept = keep(torch.ones(1, size), size, 0.5, 0.0, 8)
    assert kept.ids.tolist() == [list(range(8))]
    assert kept.weights.tolist() == [[filters.UNIT] * 8]
    assert not kept.complete.any()
