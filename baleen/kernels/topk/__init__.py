"""The selection: the best-scored cached tokens of each query token. Imports: kernels.dispatch."""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "cuda": "baleen.kernels.topk.cuda_kernel:topk",
    "capturable": "baleen.kernels.topk.capturable:topk",
    "reference": "baleen.kernels.topk.reference:topk",
}

_topk = Op(IMPLEMENTATIONS)
_topk_slots = Op(IMPLEMENTATIONS, "topk_slots")
_topk_mask = Op(IMPLEMENTATIONS, "topk_mask")


def topk(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Picks the k best-scored cached tokens of each query token.

    logits   [T, S] float32; column j >= lengths[t] is ignored whatever it holds
    lengths  [T] int64, tokens; 0 <= lengths[t] <= S
    returns  [T, k] int64 positions in the request, rising, then -1 where lengths[t] < k
    Error:   exact scores; equal ones (0.0 and -0.0 are equal) by lowest position; NaN before lengths[t] counts as -inf.
    Cost:    on a Hopper GPU reads logits once (twice in rows that a sample misjudges), no scratch, k up to 2048;
             elsewhere about four times, scratch about 12 MiB, or three rows if these are larger.
    Raises:  ValueError if k < 1.
    Source:  DeepSeek-V3.2 report, section 2.1.
    """
    return _topk(logits, lengths, k)


def topk_slots(
    logits: Tensor, lengths: Tensor, k: int, page_table: Tensor | None = None, num_queries: int = 1, page_size: int = 64
) -> Tensor:
    """What `topk` picks, as KV slots.

    page_table  [R, P] int64 or int32 page ids, any row stride; row t of the logits is of request t // num_queries, and
                its position p lies at slot page_table[t // num_queries, p // page_size] * page_size + p % page_size.
                None: positions themselves
    page_size   a power of two
    returns     [T, k] int32, in the order of the positions, then -1 where lengths[t] < k
    Error:      none, as `topk`; cost and raises too.
    """
    return _topk_slots(logits, lengths, k, page_table, num_queries, page_size)


def topk_mask(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    """What `topk` picks, as a bitmask.

    returns  [T, ceil(S / 32)] int32: bit j of word w is set if position 32 * w + j is picked
    Error:   none, as `topk`; cost and raises too.
    """
    return _topk_mask(logits, lengths, k)
