"""How the selected rows of few tokens are shared out among many programs, which leave parts to be added up."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MOST_PARTS = 64


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=4096)
def shares(programs: int, num_selected: int, keys: int, at_once: int) -> tuple[int, int]:
    """Into how many parts to cut each list of indices, and their length, for the fewest tiles one after another.

    programs  how many there are without cutting; at_once  how many run at a time; keys  rows of a tile
    A program costs some two tiles beside its own, adding up as much again.
    """
    num_tiles = max(-(-num_selected // keys), 1)

    def tiles_in_turn(parts: int) -> int:
        return -(-programs * parts // at_once) * (-(-num_tiles // parts) + 2) + 2 * (parts > 1)

    parts = min((1 << power for power in range(min(num_tiles, MOST_PARTS).bit_length())), key=tiles_in_turn)
    tiles = -(-num_tiles // parts)
    return -(-num_tiles // tiles), tiles * keys


def empty_parts(out: Tensor, parts: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """For out [T, H, Dl]: sums before the division [T, parts, H, Dl], largest scores and totals [T, parts, H], float32.

    None if there is one part, which writes out itself.
    """
    if parts == 1:
        return None, None, None
    num_tokens, num_heads, d_v = out.shape
    sums = torch.empty(num_tokens, parts, num_heads, d_v, dtype=torch.float32, device=out.device)
    maxima, totals = torch.empty(2, num_tokens, parts, num_heads, dtype=torch.float32, device=out.device)
    return sums, maxima, totals
