"""Inputs of a decode step in torch."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.decode_inputs import DecodeInputs


def decode_inputs(
    slots: Tensor, positions: Tensor, last_ids: Tensor, page_table: Tensor, num_pages: int, page_size: int
) -> DecodeInputs:
    table = page_table[slots, :num_pages]
    pages = table.gather(1, positions[:, None] // page_size)[:, 0]
    lengths = positions + 1
    return DecodeInputs(
        last_ids[slots].clamp_min(0), pages * page_size + positions % page_size, table.int(), lengths, lengths.int()
    )
