"""The absorbed form of MLA, around the kernel that attends: queries into the latent space, values out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.attention.batch import Group
from baleen.config import PAGE_SIZE


def absorb(q: Tensor, w_kc: Tensor) -> Tensor:
    """q [T, H, nope + rope], w_kc [H, nope, latent] -> [T, H, latent + rope], which attends to rows of the cache."""
    nope = w_kc.shape[1]
    latent = torch.bmm(q[..., :nope].transpose(0, 1), w_kc).transpose(0, 1)
    return torch.cat([latent, q[..., nope:]], dim=-1)


def head_values(attended: Tensor, w_vc: Tensor) -> Tensor:
    """Attended latents [T, H, latent], w_vc [H, latent, v] -> [T, H, v]."""
    return torch.bmm(attended.transpose(0, 1), w_vc).transpose(0, 1)


def position_slots(group: Group, positions: Tensor) -> Tensor:
    """Positions [G*Q, k] -> KV slots [G*Q, k] through the page table; -1 stays -1."""
    safe = positions.clamp_min(0)
    shape = (group.num_requests, -1)
    pages = group.page_table.gather(1, (safe // PAGE_SIZE).view(shape)).view_as(positions)
    return torch.where(positions < 0, positions, pages * PAGE_SIZE + safe % PAGE_SIZE)
