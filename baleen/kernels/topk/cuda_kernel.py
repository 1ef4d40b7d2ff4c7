"""Top-k by the kernel in topk.cu: Hopper or newer, k up to 2048, any row length."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from baleen.kernels import cuda
from baleen.kernels.topk import capturable

MAX_K = 2048
_SHARED_BYTES = 8192 * 8 + 2048 * 4  # the buffer and the histogram
_CLUSTERS = (8, 4, 2, 1)


def topk(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    num_rows = logits.shape[0]
    if not 1 <= k <= MAX_K or not logits.is_cuda or logits.stride(1) != 1:
        return capturable.topk(logits, lengths, k)
    out = torch.empty(num_rows, k, dtype=torch.int64, device=logits.device)
    if num_rows:
        kernels, num_multiprocessors = _kernels(logits.device.index)
        cluster = _cluster(num_rows, num_multiprocessors)
        grid, block = (num_rows * cluster, 1024) if cluster else (num_rows, 512)
        kernels[cluster].launch(grid, block, logits, logits.stride(0), lengths.contiguous(), out, k)
    return out


def _cluster(num_rows: int, num_multiprocessors: int) -> int:
    """Blocks a row: as many as fit at once, or 0 for the small blocks that share a multiprocessor."""
    return next((cluster for cluster in _CLUSTERS if num_rows * cluster <= num_multiprocessors), 0)


@cache
def _kernels(device: int) -> tuple[dict[int, cuda.Kernel], int]:
    """All of them, so that none is left to be loaded while a CUDA graph is captured."""
    names = {0: "topk_many_rows", **{cluster: f"topk_cluster_{cluster}" for cluster in _CLUSTERS}}
    source = Path(__file__).with_name("topk.cu")
    properties = torch.cuda.get_device_properties(device)
    return {
        cluster: cuda.kernel(source, name, device, _SHARED_BYTES) for cluster, name in names.items()
    }, properties.multi_processor_count


if torch.cuda.get_device_capability()[0] < 9:
    raise ModuleNotFoundError("topk.cu needs compute capability 9.0 or newer", name="cuda")
