"""Rows of a step: fewer and more than a program has, turns before and after the places begin again, rows that stay."""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case

NUM_SLOTS = 80


def _step(num_rows: int, steps: int, g: torch.Generator) -> tuple[Any, ...]:
    ids = torch.randint(-1, 130000, (num_rows,), generator=g)
    slots = torch.randperm(NUM_SLOTS, generator=g)[:num_rows]
    if num_rows > 2:  # padding: one slot in several rows, which the same token comes from
        slots[-2], ids[-2] = slots[-1], ids[-1]
    return (
        ids,
        slots,
        torch.randint(0, 130000, (NUM_SLOTS,), generator=g),
        torch.randint(0, 160000, (num_rows,), generator=g),
        torch.randint(0, 2, (num_rows,), generator=g),
        torch.randint(0, 3 * steps, (num_rows,), generator=g),
        torch.full((steps, num_rows), -7),
    )


CASES = [Case("decode_outputs", _step, parameters) for parameters in ((1, 4), (1, 1), (5, 3), (32, 4), (77, 4), (0, 4))]
