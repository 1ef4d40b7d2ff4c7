"""What a request adds to single tokens: `logit_bias`, and `min_new_tokens`, which holds back the tokens that end it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from baleen.messages import OpenSlot


class TokenBias:
    """The token ids and values of each slot, on the device, so that a step uploads row numbers only."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}  # slot -> ids [n] int64, values [n] float32
        self._enders: dict[int, Tensor] = {}  # slot -> ids [n] int64

    def open(self, slot: int, opened: OpenSlot) -> None:
        """Keep what the slot's new request asks for; the caller knows which slots ask for what."""
        params = opened.sampling
        if params.logit_bias:
            ids, values = (list(column) for column in zip(*params.logit_bias, strict=True))
            self._biases[slot] = (self._tensor(ids, torch.int64), self._tensor(values, torch.float32))
        if params.min_new_tokens:
            # A stop id outside the vocabulary is never chosen anyway.
            enders = {i for i in (*self._eos_token_ids, *params.stop_token_ids) if 0 <= i < self._vocab_size}
            self._enders[slot] = self._tensor(sorted(enders), torch.int64)

    def add(self, logits: Tensor, slots: Sequence[int]) -> Tensor:
        """The logits plus the biases. logits [R, V] float32, slots [R] with biases -> [R, V], new."""
        entries = [self._biases[slot] for slot in slots]
        places = self._places([ids for ids, _ in entries])
        values = torch.cat([values for _, values in entries])
        flat = logits.flatten()
        return flat.index_put((places,), flat[places] + values).view_as(logits)

    def hold_back(self, logits: Tensor, slots: Sequence[int]) -> Tensor:
        """The logits with -inf for the ids that end a request, but for rows that allow nothing else.

        logits [R, V] float32, slots [R] with min_new_tokens -> [R, V], new. NaN and +inf stay what they are.
        """
        places = self._places([self._enders[slot] for slot in slots])
        flat = logits.flatten()
        held = flat.index_put((places,), flat[places] + -math.inf).view_as(logits)
        return torch.where(held.amax(dim=1, keepdim=True) == -math.inf, logits, held)

    def _places(self, ids: Sequence[Tensor]) -> Tensor:
        """Ids of each row as places in the flattened logits: all different, since those of a row are."""
        starts = torch.arange(0, len(ids) * self._vocab_size, self._vocab_size)
        counts = torch.tensor([len(row) for row in ids])
        offsets = starts.repeat_interleave(counts)
        if self._device.type == "cuda":
            offsets = offsets.pin_memory()
        return torch.cat(list(ids)).add_(offsets.to(self._device, non_blocking=True))

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device)
