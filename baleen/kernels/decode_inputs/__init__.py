"""What a decode step reads of the requests' slots. Imports: kernels.{dispatch,pdl}."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.decode_inputs.triton_kernel:decode_inputs",
    "reference": "baleen.kernels.decode_inputs.reference:decode_inputs",
}

_decode_inputs = Op(IMPLEMENTATIONS)


class DecodeInputs(NamedTuple):
    """One token a request, R of them.

    ids            [R] int64, the token last sampled; 0 where that is -1, as of bad logits: some id has to be there
    kv_slots       [R] int64, where its keys go: page * page_size + offset
    page_table     [R, P] int32
    lengths        [R] int64, position + 1
    short_lengths  [R] int32, the same
    """

    ids: Tensor
    kv_slots: Tensor
    page_table: Tensor
    lengths: Tensor
    short_lengths: Tensor


def decode_inputs(
    slots: Tensor, positions: Tensor, last_ids: Tensor, page_table: Tensor, num_pages: int, page_size: int
) -> DecodeInputs:
    """Rows of what is kept by slot, for the requests of a step.

    slots       [R] int64, rows of the two below; may repeat
    positions   [R] int64, 0 <= positions[r] < num_pages * page_size
    last_ids    [N] int64
    page_table  [N, M] int64 page ids below 2^31, by position // page_size; M >= num_pages
    num_pages   P, how many of a row are taken
    Error:      none.     Cost: reads 8 and writes 4 bytes a page of the result.
    """
    found: DecodeInputs = _decode_inputs(slots, positions, last_ids, page_table, num_pages, page_size)
    return found
