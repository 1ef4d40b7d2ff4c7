"""Outputs of a decode step against a loop over rows, and Triton's in its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baleen.kernels.decode_outputs import IMPLEMENTATIONS
from baleen.kernels.decode_outputs.cases import CASES
from baleen.kernels.dispatch import available
from baleen.kernels.testing import Case, check, run_in_interpreter


def _loop(
    ids: Tensor, slots: Tensor, last_ids: Tensor, positions: Tensor, advance: Tensor, turns: Tensor, places: Tensor
) -> None:
    for row, (chosen, slot, turn) in enumerate(zip(ids.tolist(), slots.tolist(), turns.tolist(), strict=True)):
        last_ids[slot] = chosen
        places[turn % places.shape[0], row] = chosen
        positions[row] += int(advance[row])
        turns[row] = turn + 1


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
