"""Penalties by hand and against transformers; the table of counts as slots come and go."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from baleen.sampling.penalties import TokenHistory

CPU = torch.device("cpu")


def penalised(
    history: TokenHistory, slot: int, logits: list[float], repetition: float, frequency: float, presence: float
) -> list[float]:
    amounts = [torch.tensor([[amount]]) for amount in (repetition, frequency, presence)]
    rows = torch.tensor(history.rows([slot]))
    return history.penalise(torch.tensor([logits]), rows, *amounts)[0].tolist()


def test_by_hand() -> None:
    """Tokens 0, 1 in the prompt; 1 and 2 put out once, 3 twice; 4 never seen."""
    history = TokenHistory(4, 5, CPU)
    history.open(2, [0, 1, 1, 2, 3], num_prompt=2)
    history.record(torch.tensor(history.rows([2])), torch.tensor([3]))
    logits = [2.0, -2.0, 4.0, 0.0, 1.0]
    assert penalised(history, 2, logits, 2.0, 0.0, 0.0) == [1.0, -4.0, 2.0, 0.0, 1.0]
    assert penalised(history, 2, logits, 1.0, 0.5, 0.0) == [2.0, -2.5, 3.5, -1.0, 1.0]
    assert penalised(history, 2, logits, 1.0, 0.0, 0.25) == [2.0, -2.25, 3.75, -0.25, 1.0]
    assert penalised(history, 2, logits, 2.0, 0.5, 0.25) == [1.0, -4.75, 1.25, -1.25, 1.0]
    assert penalised(history, 2, logits, 1.0, -1.0, 0.0) == [2.0, -1.0, 5.0, 2.0, 1.0]


def test_repetition_as_transformers() -> None:
    logits = torch.randn(8, 200, generator=torch.Generator().manual_seed(5)) * 3
    seen = torch.randint(200, (8, 60), generator=torch.Generator().manual_seed(6))
    history = TokenHistory(8, 200, CPU)
    for slot in range(8):
        history.open(slot, seen[slot].tolist(), num_prompt=10 * slot % 60)
    rows = torch.tensor(history.rows(range(8)))
    none = torch.zeros(8, 1)
    for penalty in (1.3, 0.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
        got = history.penalise(logits, rows, torch.full((8, 1), penalty), none, none)
        torch.testing.assert_close(got, expected)


def test_rows_are_allocated_when_needed_and_used_again() -> None:
    history = TokenHistory(100, 10, CPU)
    assert history._table.numel() == 0
    for slot in (50, 7, 99):
        history.open(slot, [slot % 10], num_prompt=0)
    assert history._table.shape[0] <= 4
    history.close(7)
    history.close(7)
    history.open(8, [1], num_prompt=0)
    assert history._table.shape[0] <= 4
    zeros = [0.0] * 10
    for slot, token_id in ((50, 0), (99, 9), (8, 1)):
        expected = [-1.0 if other == token_id else 0.0 for other in range(10)]
        assert penalised(history, slot, zeros, 1.0, 1.0, 0.0) == pytest.approx(expected)
    for slot in range(100):
        history.open(slot, [], num_prompt=0)
    assert history._table.shape[0] == 100
    assert penalised(history, 50, zeros, 1.0, 1.0, 0.0) == zeros


def test_no_token_counts_nothing() -> None:
    history = TokenHistory(2, 3, CPU)
    history.open(0, [], num_prompt=0)
    history.open(1, [], num_prompt=0)
    history.record(torch.tensor(history.rows([0, 1])), torch.tensor([-1, 2]))
    assert penalised(history, 0, [1.0, 1.0, 1.0], 1.0, 1.0, 1.0) == [1.0, 1.0, 1.0]
    assert penalised(history, 1, [1.0, 1.0, 1.0], 1.0, 1.0, 1.0) == [1.0, 1.0, -1.0]
