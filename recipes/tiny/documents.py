"""Packed documents: one row of tokens, documents end to end, and the long ones in groups of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SCORES = 48 << 20  # places x places of a group, where it holds more than one document


@dataclass
class Group:
    """Neighbouring documents of similar length as [B, L], padded at their ends.

    start, end  the tokens they fill
    lengths     [B] int64; starts [B] int64, their first tokens
    rows        [B * L] int64, the token at each place; a padded place repeats another of its document. None: B is 1
    places      [end - start] int64, the place of each token; None: B is 1
    """

    start: int
    end: int
    size: int
    length: int
    lengths: Tensor
    starts: Tensor
    rows: Tensor | None
    places: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...]."""
        if self.rows is not None:
            return x.index_select(0, self.rows).unflatten(0, (self.size, self.length))
        pad = self.length - (self.end - self.start)
        return F.pad(x[self.start : self.end], (0, 0) * (x.dim() - 1) + (0, pad))[None]

    def scatter(self, y: Tensor) -> Tensor:
        """[B, L, ...] -> [end - start, ...], the places of tokens only."""
        if self.places is not None:
            return y.flatten(0, 1).index_select(0, self.places)
        return y[0, : self.end - self.start]


@dataclass
class Documents:
    """Where the documents of a packed row lie.

    positions   [T] int64, position in the document
    cu_seqlens  [D + 1] int32, starts of the documents and the end
    max_len     no document is longer
    spans       host (start, end) of each document
    front       so many documents at the front are no longer than top-k; `groups` holds the others
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_len: int
    spans: list[tuple[int, int]]
    front: int
    groups: list[Group]

    def head(self, topk: int) -> Documents | None:
        """The documents at the front that a selection leaves whole."""
        if not self.front:
            return None
        end = self.spans[self.front - 1][1]
        return Documents(
            self.positions[:end], self.cu_seqlens[: self.front + 1], topk, self.spans[: self.front], self.front, []
        )


def packed(lengths: Sequence[int], topk: int, device: torch.device | str = "cpu") -> Documents:
    """Documents of the given lengths, end to end. Few groups come of lengths in rising order."""

    def move(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        tensor = torch.from_numpy(array)
        if torch.device(device).type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(dtype)

    starts = [0, *accumulate(lengths)]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    front = 0
    while front < len(lengths) and lengths[front] <= topk:
        front += 1
    groups = []
    for first, last in _ranges(lengths, front):
        size, longest = last - first, max(lengths[first:last])
        length = -(-longest // 64) * 64
        rows = places = None
        if size > 1:
            grid = np.arange(length)[None]
            own = np.array(lengths[first:last])[:, None]
            rows = move((np.array(starts[first:last])[:, None] + grid % own).reshape(-1))
            places = move(np.flatnonzero((grid < own).reshape(-1)))
        groups.append(
            Group(
                starts[first], starts[last], size, length, move(np.array(lengths[first:last])),
                move(np.array(starts[first:last])), rows, places,
            )
        )  # fmt: skip
    cu = move(np.array(starts, np.int32), torch.int32)
    return Documents(move(positions), cu, max(lengths), list(pairwise(starts)), front, groups)


def _ranges(lengths: Sequence[int], front: int) -> list[tuple[int, int]]:
    """Documents from `front` on as ranges: lengths within a factor of 1.5, and no more than GROUP_SCORES places."""
    ranges = []
    first = front
    while first < len(lengths):
        last, low, high = first + 1, lengths[first], lengths[first]
        while last < len(lengths):
            low, high = min(low, lengths[last]), max(high, lengths[last])
            if high > 1.5 * low or (last + 1 - first) * (high + 64) ** 2 > GROUP_SCORES:
                break
            last += 1
        ranges.append((first, last))
        first = last
    return ranges
