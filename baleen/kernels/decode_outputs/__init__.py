"""What a decode step leaves for the next one and for the host. Imports: kernels.{dispatch,pdl}."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.decode_outputs.triton_kernel:decode_outputs",
    "reference": "baleen.kernels.decode_outputs.reference:decode_outputs",
}

_decode_outputs = Op(IMPLEMENTATIONS)


def decode_outputs(
    ids: Tensor, slots: Tensor, last_ids: Tensor, positions: Tensor, advance: Tensor, turns: Tensor, places: Tensor
) -> None:
    """In place, for each row r: last_ids[slots[r]] = places[turns[r] % S, r] = ids[r]; positions[r] += advance[r];
    turns[r] += 1.

    ids                 [R] int64, what the step sampled
    slots               [R] int64, rows of last_ids; of equal ones any may win
    last_ids            [N] int64
    positions, advance  [R] int64
    turns               [R] int64, not negative
    places              [S, R] int64, which the host may read: pinned memory as the device sees it
    Error:              none.     Cost: nothing but the launch.
    """
    _decode_outputs(ids, slots, last_ids, positions, advance, turns, places)
