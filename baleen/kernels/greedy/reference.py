"""Argmax in torch, of which `max` finds NaN as well as +inf."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    largest, ids = logits.max(dim=1)
    return torch.where(largest.isfinite(), ids, -1)
