"""Log-probabilities against numpy in float64, and the order of equals by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from baleen.sampling.logprobs import prompt_logprobs, token_logprobs


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


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_prompt_logprobs_do_not_depend_on_the_chunk(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(7, 16, generator=generator), torch.randn(50, 16, generator=generator)
    token_ids = [3, 0, 49, 7, 7, 12, 1]
    most = 0

    def head(states: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(states))
        return states @ weight.T

    entries = prompt_logprobs(head, hidden, token_ids, 2, rows)
    assert most == min(rows, 7)
    exact = (hidden.double() @ weight.double().T).log_softmax(dim=1)
    assert len(entries) == 7
    for row, (entry, token_id) in enumerate(zip(entries, token_ids)):
        assert entry.logprob == pytest.approx(exact[row, token_id].item(), abs=1e-5)
        top = exact[row].topk(2)
        assert [i for i, _ in entry.top] == top.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_prompt_logprobs_of_bad_logits_are_nan(bad: float) -> None:
    """Whichever token holds it."""
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    for token_id in (2, 4):
        entries = prompt_logprobs(lambda states: states, logits, [token_id] * 3, 1, 8)
        assert [math.isnan(entry.logprob) for entry in entries] == [False, True, False]
