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


def topk(logits: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Picks the k best-scored cached tokens of each query token.

    logits   [T, S] float32; column j >= lengths[t] is ignored whatever it holds
    lengths  [T] int64, tokens; 0 <= lengths[t] <= S
    returns  [T, k] int64 positions in the request, rising, then -1 where lengths[t] < k
    Error:   exact scores; equal ones (0.0 and -0.0 are equal) by lowest position; NaN before lengths[t] counts as -inf.
    Cost:    on a Hopper GPU reads logits once (twice in rows that a sample misjudges), k up to 2048; elsewhere about
             four times, scratch about 12 MiB, or three rows if these are larger.
    Raises:  ValueError if k < 1.
    Source:  DeepSeek-V3.2 report, section 2.1.
    """
    return _topk(logits, lengths, k)
