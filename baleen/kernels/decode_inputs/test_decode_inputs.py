"""Inputs of a decode step against a loop over requests, and Triton's in its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baleen.kernels.decode_inputs import IMPLEMENTATIONS, DecodeInputs
from baleen.kernels.decode_inputs.cases import CASES
from baleen.kernels.dispatch import available
from baleen.kernels.testing import Case, check, run_in_interpreter


def _loop(
    slots: Tensor, positions: Tensor, last_ids: Tensor, page_table: Tensor, num_pages: int, page_size: int
) -> DecodeInputs:
    tables = page_table.tolist()
    rows = [tables[slot][:num_pages] for slot in slots.tolist()]
    places = positions.tolist()
    kv_slots = [row[at // page_size] * page_size + at % page_size for row, at in zip(rows, places, strict=True)]
    lengths = torch.tensor([at + 1 for at in places], dtype=torch.int64)
    ids = torch.tensor([max(last_ids.tolist()[slot], 0) for slot in slots.tolist()], dtype=torch.int64)
    table = torch.tensor(rows, dtype=torch.int32).view(len(rows), num_pages)
    return DecodeInputs(ids, torch.tensor(kv_slots, dtype=torch.int64), table, lengths, lengths.int())


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
