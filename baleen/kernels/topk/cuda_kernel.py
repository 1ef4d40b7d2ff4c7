"""Top-k by the kernels in topk.cu: Hopper or newer, k up to 2048, rows of up to 16 million scores."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.kernels import cuda, pdl
from baleen.kernels.topk import capturable

MAX_K = 2048
MAX_COLUMNS = 1 << 24  # positions are compared as float32
_POSITIONS, _SLOTS, _MASK = range(3)


class Layout(NamedTuple):
    """A kernel of topk.cu. blocks: those that share a row; shared_bytes: the buffer of long rows, their map or ring."""

    name: str
    threads: int
    blocks: int
    shared_bytes: int


HELD = 16  # scores a thread holds of a short row
SHORT = {threads: Layout(f"topk_short_{threads}", threads, 1, 0) for threads in (256, 512, 1024)}
LONG = Layout("topk_by_1", 512, 1, 512 * 32 + 8192 * 8)
RING = {blocks: Layout(f"topk_ring_{blocks}", 512, blocks, 4 * 512 * 64 + 8192 * 8) for blocks in (8, 4, 2, 1)}


def topk(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    if not _fits(logits, k):
        return capturable.topk(logits, lengths, k)
    out = torch.empty(logits.shape[0], k, dtype=torch.int64, device=logits.device)
    _launch(logits, lengths, k, _POSITIONS, out)
    return out


def topk_slots(
    logits: Tensor, lengths: Tensor, k: int, page_table: Tensor | None = None, num_queries: int = 1, page_size: int = 64
) -> Tensor:
    if not _fits(logits, k) or not (page_table is None or _is_page_table(page_table, page_size)):
        return capturable.topk_slots(logits, lengths, k, page_table, num_queries, page_size)
    out = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
    _launch(logits, lengths, k, _SLOTS, out, page_table, num_queries, page_size)
    return out


def topk_mask(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    if not _fits(logits, k):
        return capturable.topk_mask(logits, lengths, k)
    out = torch.empty(logits.shape[0], (logits.shape[1] + 31) // 32, dtype=torch.int32, device=logits.device)
    _launch(logits, lengths, k, _MASK, out)
    return out


def _fits(logits: Tensor, k: int) -> bool:
    return 1 <= k <= MAX_K and logits.is_cuda and logits.stride(1) == 1 and logits.shape[1] <= MAX_COLUMNS


def _is_page_table(page_table: Tensor, page_size: int) -> bool:
    is_whole = page_table.stride(1) == 1 and page_table.dtype in (torch.int32, torch.int64)
    return is_whole and page_size.bit_count() == 1


def _launch(
    logits: Tensor,
    lengths: Tensor,
    k: int,
    output: int,
    out: Tensor,
    page_table: Tensor | None = None,
    num_queries: int = 1,
    page_size: int = 64,
    layout: Layout | None = None,
) -> None:
    num_rows, columns = logits.shape
    if not num_rows:
        return
    kernels, num_multiprocessors = _kernels(logits.device.index)
    if layout is None:
        # A row that begins between two 16-byte words takes one more.
        aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 4 == 0
        layout = choose(num_rows, columns if aligned else columns + 3, num_multiprocessors)
    kernels[layout.name].launch(
        num_rows * layout.blocks,
        layout.threads,
        logits,
        logits.stride(0),
        columns,
        lengths.contiguous(),
        k,
        output,
        out,
        out.shape[1] * out.element_size(),
        0 if page_table is None else page_table,
        0 if page_table is None else page_table.stride(0) * page_table.element_size(),
        num_queries,
        page_size.bit_length() - 1,
        int(page_table is not None and page_table.dtype == torch.int64),
        early=pdl.ENABLED,
    )


def choose(num_rows: int, columns: int, num_multiprocessors: int) -> Layout:
    """Short rows in registers: of few rows each is done sooner by more threads, of many rows more fit at once.

    Long rows in as many blocks as pay, each with 16,384 scores to read or more. A block with a ring has a
    multiprocessor of its own, and a cluster lies in one group of them (16 or 18 on an H200): larger clusters leave some
    of a group idle, so that all of them run at once only where there is room to spare. Many rows: two blocks on a
    multiprocessor, one of them at work while the other waits.
    """
    few = num_rows <= num_multiprocessors
    for threads in (512, 1024) if few else (256, 512):
        if columns <= HELD * threads:
            return SHORT[threads]
    if not few:
        return LONG
    for blocks, room in ((8, num_multiprocessors // 2), (4, num_multiprocessors * 3 // 4), (2, num_multiprocessors)):
        if num_rows * blocks <= room and columns >= 16384 * blocks:
            return RING[blocks]
    return RING[1]


@cache
def _kernels(device: int) -> tuple[dict[str, cuda.Kernel], int]:
    """All of them, so that none is left to be loaded while a CUDA graph is captured."""
    source = Path(__file__).with_name("topk.cu")
    layouts = [*SHORT.values(), LONG, *RING.values()]
    kernels = {layout.name: cuda.kernel(source, layout.name, device, layout.shared_bytes) for layout in layouts}
    return kernels, torch.cuda.get_device_properties(device).multi_processor_count


if torch.cuda.get_device_capability()[0] < 9:
    raise ModuleNotFoundError("topk.cu needs compute capability 9.0 or newer", name="cuda")
