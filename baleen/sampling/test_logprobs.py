"""Log-probabilities against numpy in float64, and the order of equals by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baleen.sampling.logprobs import token_logprobs


def test_against_numpy() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(3)) * 5
    ids = torch.tensor([0, 299, 5, 17, 100, 200])
    num_top = [0, 1, 5, 20, 3, 2]
    entries = token_logprobs(logits, ids, num_top)
    exact = logits.double().numpy()
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row, entry in enumerate(entries):
        assert entry is not None
        assert entry.logprob == pytest.approx(exact[row, ids[row]], abs=1e-5)
        order = np.argsort(-exact[row])[: num_top[row]]
        assert [token_id for token_id, _ in entry.top] == order.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(exact[row, order].tolist(), abs=1e-5)


def test_equal_logits_rank_by_lowest_id() -> None:
    """bfloat16 logits have many equals; 0.0 and -0.0 are equal too."""
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    logits[1] = torch.tensor([0.0, -0.0]).repeat(1000)
    logits[2] = -logits[2].abs()
    entries = token_logprobs(logits, torch.zeros(4, dtype=torch.int64), [50] * 4)
    for row, entry in enumerate(entries):
        assert entry is not None
        expected = sorted(range(2000), key=lambda token_id: (-float(logits[row, token_id]), token_id))[:50]
        assert [token_id for token_id, _ in entry.top] == expected


def test_more_than_the_vocabulary_gives_the_vocabulary() -> None:
    (entry,) = token_logprobs(torch.tensor([[1.0, 2.0, float("-inf")]]), torch.tensor([1]), [20])
    assert entry is not None
    assert [token_id for token_id, _ in entry.top] == [1, 0, 2]
    assert entry.top[2][1] == float("-inf")


def test_a_row_without_a_token_has_none() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [0.0, 0.0]])
    bad, good = token_logprobs(logits, torch.tensor([-1, 0]), [2, 1])
    assert bad is None
    assert good is not None
    assert good.logprob == pytest.approx(-0.6931472)
