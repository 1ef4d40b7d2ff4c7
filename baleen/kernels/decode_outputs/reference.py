"""Outputs of a decode step in torch."""

from __future__ import annotations

from torch import Tensor


def decode_outputs(
    ids: Tensor, slots: Tensor, last_ids: Tensor, positions: Tensor, advance: Tensor, turns: Tensor, places: Tensor
) -> None:
    last_ids.index_copy_(0, slots, ids)
    places.scatter_(0, (turns % places.shape[0])[None], ids[None])
    positions.add_(advance)
    turns.add_(1)
