"""Requests of a step: repeated slots, tables taken whole and in part, wider than one program's share; no request."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case

NUM_SLOTS = 9
PAGE_SIZE = 64


def _step(num_rows: int, width: int, num_pages: int, g: torch.Generator) -> tuple[Any, ...]:
    slots = torch.randint(0, NUM_SLOTS, (num_rows,), generator=g)
    positions = torch.randint(0, num_pages * PAGE_SIZE, (num_rows,), generator=g)
    positions[:1], positions[1:2] = 0, num_pages * PAGE_SIZE - 1
    last_ids = torch.randint(-1, 130000, (NUM_SLOTS,), generator=g)
    last_ids[slots[:1]] = -1
    # Page ids whose slots take more than 31 bits.
    page_table = torch.randint(0, 2**31 - 1, (NUM_SLOTS, width), generator=g)
    return slots, positions, last_ids, page_table, num_pages, PAGE_SIZE


CASES = [
    Case("decode_inputs", _step, parameters)
    for parameters in ((1, 4, 4), (6, 33, 32), (16, 70, 1), (3, 2600, 2500), (0, 8, 8))
]
