from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import _load
from baleen.attention.test_backend import CASES
from baleen.attention.test_over_rows import check, stand_in


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    qv: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor,
    softmax_scale: float,
    causal: bool = False,
) -> Tensor:
    """q, qv [B, 1, H, D], caches [pages, page size, 1, D], page_table int32 [B, P], cache_seqlens int32 [B]."""
    assert q.shape[:3] == qv.shape[:3] == (len(page_table), 1, q.shape[2])
    assert k_cache.shape[:3] == v_cache.shape[:3]
    assert (page_table.dtype, cache_seqlens.dtype) == (torch.int32, torch.int32)
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    out = torch.empty_like(qv)
    for b, pages in enumerate(page_table.tolist()):
        size = k_cache.shape[1]
        rows = [(pages[i // size], i % size) for i in range(int(cache_seqlens[b]))]
        k = torch.stack([k_cache[page, offset, 0] for page, offset in rows])
        v = torch.stack([v_cache[page, offset, 0] for page, offset in rows])
        scores = (q[b, 0] @ k.T + qv[b, 0] @ v.T) * softmax_scale
        out[b, 0] = scores.softmax(-1) @ v
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv", ["float32", "fp8_e4m3"])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str, kv: str) -> None:
    calls: list[int] = []

    def recording(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return flash_attn_with_kvcache(*args, **options)

    stand_in(monkeypatch, "fa3", {"flash_attn_interface": {"flash_attn_with_kvcache": recording}})
    check(_load("fa3"), case, kv)
    assert calls or (kv == "fp8_e4m3" and "decode," in case)
