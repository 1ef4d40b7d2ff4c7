"""The ragged tokens of one step, and how they are grouped for the attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baleen.config import PAGE_SIZE
from baleen.kernels.index_logits import PagePlan


@dataclass(frozen=True)
class ForwardBatch:
    """R requests with T tokens in all; the tokens of a request are consecutive, decode requests (one token) come first.

    ids         [T] int64
    positions   [T] int64, position in the request
    slots       [T] int64, KV slot of the token: page * 64 + offset
    page_table  [R, P] int64 or int32 page ids; entries past a request's last page are some page of the pool, whatever
                it holds
    q_lens      R host ints, tokens computed now
    seq_lens    R host ints, tokens in the cache once this step has stored its own
    num_decode  the first num_decode requests have q_len 1 and use the decode kernels
    lengths     positions + 1 as int64 and as int32, [R] each, where all requests have q_len 1; None: not made yet
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    q_lens: list[int]
    seq_lens: list[int]
    num_decode: int
    lengths: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Group:
    """Requests computed together: G of them, Q query tokens each, of like length.

    tokens      [G*Q] int64 rows of the batch, request by request, or a slice where they are consecutive
    page_table  [G, P] int64 or int32, P pages hold the longest of them
    lengths     [G*Q] int64, number of tokens that each query token may see: its position + 1
    max_length  the largest of `lengths`, or more: a host int
    short_lengths
                `lengths` as int32, where the batch has them
    pages       prepared scoring of the index keys in their pages; None: keys are gathered
    everything  the selection that leaves nothing out, in the form its attention takes; None where some query sees more
                than top-k tokens, or the attention needs none
    """

    tokens: Tensor | slice
    page_table: Tensor
    lengths: Tensor
    max_length: int
    num_queries: int
    is_decode: bool
    short_lengths: Tensor | None = None
    pages: PagePlan | None = None
    everything: Tensor | None = None

    @property
    def num_requests(self) -> int:
        return self.page_table.shape[0]

    def context_slots(self) -> Tensor:
        """KV slots of the only request's tokens, in order of position: [max_length] int64."""
        assert self.num_requests == 1
        positions = torch.arange(self.max_length, device=self.page_table.device)
        return self.page_table[0, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE


def group_batch(batch: ForwardBatch) -> list[Group]:
    """Split a batch into groups: each prefill chunk alone, decode requests by length on a CPU, as one on a GPU.

    On a CPU decode lengths in a group differ by less than a factor of two (or 256 tokens), which bounds the work spent
    on padding: one request of 131,072 tokens must not make its 63 short neighbours pay for as many. A GPU's kernels
    know each row's length.
    """
    on_cpu = batch.positions.device.type == "cpu"
    order = sorted(range(batch.num_decode), key=lambda r: batch.seq_lens[r])
    groups: list[Group] = []
    start = 0
    while start < len(order):
        end = start + 1
        limit = max(2 * batch.seq_lens[order[start]], batch.seq_lens[order[start]] + 256)
        while end < len(order) and (not on_cpu or batch.seq_lens[order[end]] <= limit):
            end += 1
        groups.append(_decode_group(batch, order[start:end]))
        start = end
    token = batch.num_decode
    for r in range(batch.num_decode, len(batch.q_lens)):
        tokens = slice(token, token + batch.q_lens[r])
        pages = -(-batch.seq_lens[r] // PAGE_SIZE)
        lengths = batch.positions[tokens] + 1
        groups.append(
            Group(tokens, batch.page_table[r : r + 1, :pages], lengths, batch.seq_lens[r], batch.q_lens[r], False)
        )
        token += batch.q_lens[r]
    return groups


def _decode_group(batch: ForwardBatch, requests: list[int]) -> Group:
    longest = batch.seq_lens[requests[-1]]
    pages = -(-longest // PAGE_SIZE)
    rows: Tensor | slice
    if len(requests) == batch.num_decode:
        rows = slice(0, batch.num_decode)
    else:
        rows = torch.tensor(requests, device=batch.positions.device)
    if batch.lengths is None:
        return Group(rows, batch.page_table[rows, :pages], batch.positions[rows] + 1, longest, 1, True)
    lengths, short = batch.lengths
    return Group(rows, batch.page_table[rows, :pages], lengths[rows], longest, 1, True, short[rows])
