"""The likeliest token against a loop over numbers, and Triton's in its interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.greedy import IMPLEMENTATIONS, greedy
from baleen.kernels.greedy.cases import CASES, special
from baleen.kernels.testing import Case, check, run_in_interpreter


def _loop(logits: Tensor) -> Tensor:
    ids = []
    for row in logits.tolist():
        best = -1
        for place, value in enumerate(row):
            if math.isnan(value) or value == math.inf:
                best = -1
                break
            if value > (row[best] if best >= 0 else -math.inf):
                best = place
        ids.append(best)
    return torch.tensor(ids, dtype=torch.int64)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_a_loop(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _loop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_a_loop(implementation: str) -> None:
    for case in CASES:
        check(IMPLEMENTATIONS, implementation, case, _loop, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    run_in_interpreter(__file__, "triton and against_a_loop")


def test_rows_without_a_token() -> None:
    assert greedy(special(8)).tolist() == [-1] * 7 + [4, 0]
