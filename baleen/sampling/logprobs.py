"""Log-probabilities of sampled tokens and of prompts, for the requests that asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from baleen.messages import TokenLogprobs

# Rows are ranked in chunks of this many logits: their int64 keys take 8 MiB.
_CHUNK_ELEMENTS = 2**20


def _rank_logits(logits: Tensor, width: int) -> Tensor:
    """Ids of the `width` largest logits of each row, descending; equal ones by lowest id, which `topk` leaves open."""
    # Float bits as an int that orders alike: negative floats get 31 lower bits flipped. + 0.0 turns -0.0 into 0.0.
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    reversed_ids = 0xFFFFFFFF - torch.arange(logits.shape[1], device=logits.device)
    keys = bits.mul_(2**32).bitwise_or_(reversed_ids)
    return 0xFFFFFFFF - (keys.topk(width).values & 0xFFFFFFFF)


def token_logprobs(logits: Tensor, ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs | None]:
    """Log-probability of one chosen token per row, and of the likeliest tokens of the row.

    logits   [R, V] float32, as the model gave them: before penalties and temperature
    ids      [R] int64, the chosen tokens; -1 gives None
    num_top  per row, how many of the likeliest tokens to report (at most V are); equal ones by lowest id
    returns  [R]; NaN where the row holds NaN or +inf
    Cost:    waits for the device once.
    """
    width = min(max(num_top), logits.shape[1])
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    normaliser = normaliser.where(normaliser.isfinite(), torch.nan)
    chosen = logits.gather(1, ids.clamp(min=0)[:, None]) - normaliser
    chunks = logits.split(max(1, _CHUNK_ELEMENTS // logits.shape[1]))
    top_ids = torch.cat([_rank_logits(chunk, width) for chunk in chunks])
    top = logits.gather(1, top_ids) - normaliser
    # One transfer; float64 holds the ids and the float32 values exactly.
    rows = torch.cat([ids[:, None].double(), chosen.double(), top_ids.double(), top.double()], dim=1).tolist()
    result: list[TokenLogprobs | None] = []
    for row, count in zip(rows, num_top, strict=True):
        if row[0] < 0:
            result.append(None)
            continue
        pairs = zip(row[2 : 2 + count], row[2 + width :], strict=False)
        result.append(TokenLogprobs(row[1], tuple((int(token_id), logprob) for token_id, logprob in pairs)))
    return result


def prompt_logprobs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Sequence[int], num_top: int, rows: int
) -> tuple[TokenLogprobs, ...]:
    """Log-probability of a given token after each hidden state, and of the likeliest ones.

    head       [R, hidden] -> logits [R, V] float32
    hidden     [T, hidden]
    token_ids  [T], the tokens that follow
    num_top    how many of the likeliest tokens to report; equal ones by lowest id
    rows       how many logits to have at once
    returns    T entries; NaN where the logits held NaN or +inf
    Cost:      waits for the device once for each `rows`.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), rows):
        logits = head(hidden[start : start + rows])
        ids = torch.tensor(token_ids[start : start + rows], device=hidden.device)
        entries += (entry for entry in token_logprobs(logits, ids, [num_top] * len(ids)) if entry is not None)
    return tuple(entries)
