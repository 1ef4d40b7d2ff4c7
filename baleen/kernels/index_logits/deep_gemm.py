"""Indexer scores by DeepGEMM (package sgl-deep-gemm): FP8 keys, 32 or 64 heads of 128."""

from __future__ import annotations

from functools import lru_cache

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.index_logits import PagePlan, reference

deep_gemm.set_pdl(True)  # see kernels/pdl.py: all its kernels wait before they read or write


def index_logits(
    q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor | None, lengths: Tensor | None = None
) -> Tensor:
    if key_scales is None or not _fits(q) or keys.shape[1] == 0:
        return reference.index_logits(q, weights, keys, key_scales, lengths)
    num_queries, num_keys = q.shape[1], keys.shape[1]
    start = torch.zeros(num_queries, dtype=torch.int32, device=q.device)
    rows = []
    for request in range(q.shape[0]):
        end = torch.full_like(start, num_keys) if lengths is None else lengths[request].int()
        pair = (keys[request].contiguous(), key_scales[request].contiguous())
        rows.append(deep_gemm.fp8_mqa_logits(q[request].contiguous(), pair, weights[request].contiguous(), start, end))
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def plan_pages(page_table: Tensor, lengths: Tensor) -> PagePlan:
    plan = reference.plan_pages(page_table, lengths)
    if not page_table.is_cuda:
        return plan
    # The kernel divides its work by this: one of other lengths makes it wait for ever.
    schedule = deep_gemm.get_paged_mqa_logits_metadata(plan.lengths, 64, _num_sms(page_table.device))
    return plan._replace(schedule=schedule)


def paged_index_logits(q: Tensor, weights: Tensor, keys: Tensor, key_scales: Tensor, plan: PagePlan) -> Tensor:
    num_pages, page_size, dim = keys.shape
    if plan.schedule is None or not _fits(q) or keys.stride(0) != page_size * (dim + 4):
        return reference.paged_index_logits(q, weights, keys, key_scales, plan)
    # It takes whole pages; of the shape only the page and its size mean something.
    pages = keys.view(torch.uint8).as_strided((num_pages, page_size, 1, dim + 4), (keys.stride(0), dim + 4, dim + 4, 1))
    longest = plan.page_table.shape[1] * page_size
    return deep_gemm.fp8_paged_mqa_logits(
        q.unsqueeze(1), pages, weights.contiguous(), plan.lengths, plan.page_table, plan.schedule, longest
    )


def _fits(q: Tensor) -> bool:
    return q.is_cuda and q.dtype == torch.float8_e4m3fn and q.shape[-2] in (32, 64) and q.shape[-1] == 128


@lru_cache(maxsize=8)
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
