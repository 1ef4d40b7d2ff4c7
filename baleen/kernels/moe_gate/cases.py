"""Inputs of moe_gate: the released router, one group, planted ties, a bias that makes scores negative, shared experts
beside the routed ones.
"""

from __future__ import annotations

from typing import Any

import torch

from baleen.kernels.testing import Case


def _router(
    rows: int, experts: int, groups: int, kept: int, top_k: int, shared: int, norm: bool, ties: bool, g: torch.Generator
) -> tuple[Any, ...]:
    logits = torch.randn(rows, experts, generator=g) * 2
    bias = torch.randn(experts, generator=g) - 1
    if ties:
        # Sigmoids of few values and no bias: most scores have an equal, groups too.
        logits, bias = logits.round().clamp(-1, 1), torch.zeros(experts)
    return logits, bias, groups, kept, top_k, 2.5, norm, shared


CASES = [
    Case("moe_gate", _router, (*shape, norm, ties), rtol=2e-6)
    for shape in (
        # tokens, experts, groups, groups kept, experts chosen, shared experts
        (3, 256, 8, 4, 8, 1),
        (17, 16, 4, 2, 4, 0),
        (9, 8, 1, 1, 2, 0),
        (4, 8, 8, 3, 3, 2),
        (5, 12, 4, 3, 5, 1),
        (5, 8, 2, 1, 4, 0),
        (1, 4, 1, 1, 4, 0),
        (0, 8, 2, 1, 2, 1),
    )
    for norm in (True, False)
    for ties in (False, True)
]
