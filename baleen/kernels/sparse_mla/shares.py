"""How the selected rows of few tokens are shared out among many programs, which leave parts to be added up."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.sparse_mla import IMPLEMENTATIONS, Parts

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


def empty_parts(shape: tuple[int, int, int, int], device: torch.device) -> Parts:
    """shape: of the sums, [T, parts, H, Dl]."""
    maxima, totals = torch.empty(2, *shape[:3], dtype=torch.float32, device=device)
    return Parts(torch.empty(shape, dtype=torch.float32, device=device), maxima, totals)


def has_fast_parts(q: Tensor, values: Tensor) -> bool:
    """True if sparse_mla_fp8_parts of these is no slower than sparse_mla_fp8: on Hopper, of the released dims."""
    released = q.dtype == torch.bfloat16 and q.shape[2] == 576 and values.shape[1] == 512
    return released and _has_hopper_kernels(q.device)


@lru_cache
def _has_hopper_kernels(device: torch.device) -> bool:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and "hopper" in available(IMPLEMENTATIONS)
