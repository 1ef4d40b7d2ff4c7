"""Muon for the matrices inside the network, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.tiny.model import TinyModel

TRAINED = {"pretrain": (False,), "warmup": (True,), "sparse": (False, True)}  # indexer's parameters or the others


class Muon:
    """Orthogonalised momentum for matrices, all of one shape at once; update size as AdamW's (0.2 rms)."""

    def __init__(self, params: list[Tensor], momentum: float = 0.95, decay: float = 0.1) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
        self.buffers = {
            shape: torch.zeros(sum(p.numel() for p in group) // (shape[0] * shape[1]), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            grad = torch.cat([_grad(p).reshape(-1, *shape) for p in group])
            buffer = self.buffers[shape]
            buffer.mul_(self.momentum).add_(grad)
            update = orthogonal(grad + self.momentum * buffer) * (0.2 * max(shape) ** 0.5)
            at = 0
            for p in group:
                count = p.numel() // (shape[0] * shape[1])
                p.mul_(1 - lr * self.decay).add_(update[at : at + count].reshape(p.shape).to(p.dtype), alpha=-lr)
                at += count


def _grad(p: Tensor) -> Tensor:
    return p.grad if p.grad is not None else torch.zeros_like(p)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """[B, R, C] -> nearly orthogonal matrices of the same row and column spaces (Newton-Schulz, bfloat16)."""
    x = g.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(-2, -1)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.transpose(-2, -1)


class Optimisers:
    """Both, over what a stage trains; the others' gradients are off."""

    def __init__(self, model: TinyModel, stage: str, lr: float, matrix_lr: float) -> None:
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in model.named_parameters():
            wanted = (".indexer." in name) in TRAINED[stage]
            p.requires_grad_(wanted)
            if not wanted:
                continue
            plain = p.dim() < 2 or name.endswith(
                ("embed_tokens.weight", "lm_head.weight", ".gate", "weights_proj.weight")
            )
            (others if plain else matrices).append(p)
        self.lr, self.matrix_lr = lr, matrix_lr
        self.muon = Muon(matrices)
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self.params = [*matrices, *others]

    def step(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.muon.step(self.matrix_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for p in self.params:
            p.grad = None
