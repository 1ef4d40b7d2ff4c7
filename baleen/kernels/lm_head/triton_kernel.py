"""The LM head in Triton, in two launches: bf16_gemm's kernel, which also writes the largest value of each row in each
of its tiles; then for each row a look at those, and at the logits of the best tile.

The first kernel could find the token too, but finding it takes twice as many instructions as finding the value, at the
end of each tile, when its program reads nothing of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.bf16_gemm import bf16_gemm
from baleen.kernels.bf16_gemm.triton_kernel import Config, default_config, fits, multiply
from baleen.kernels.greedy import greedy
from baleen.kernels.greedy.triton_kernel import best_of

# Where torch.mm is the fastest product, by less than it takes to read the logits again. A tile of more rows of the
# weight: each tile reads all of `hidden` from the L2 cache.
MANY_ROWS = Config(128, 256, 1, 64, 4, 8, True)


def lm_head(hidden: Tensor, weight: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    if not fits(hidden, weight):
        logits = bf16_gemm(hidden, weight)
        return logits, greedy(logits)
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    config = config or default_config(num_rows, *weight.shape) or MANY_ROWS
    tiles = triton.cdiv(vocab, config.block_n)
    largest = torch.empty(num_rows, tiles, dtype=torch.float32, device=hidden.device)
    logits = multiply(hidden, weight, config, largest)
    ids = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
    sizes = {"TILES": triton.next_power_of_2(tiles), "BLOCK_N": config.block_n}
    _likeliest[(num_rows,)](largest, logits, ids, tiles, vocab, **sizes, num_warps=4, **pdl.launch(logits))
    return logits, ids


@triton.jit
def _likeliest(  # type: ignore[no-untyped-def]
    largest, logits, ids, tiles, vocab, TILES: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):
    """The token of one row. Of tiles that have the same largest value the first one has the lowest token."""
    pdl.begin(PDL)
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    values = tl.load(largest + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
    best, first = best_of(values, tile)
    columns = first * BLOCK_N + tl.arange(0, BLOCK_N)
    values = tl.load(logits + row.to(tl.int64) * vocab + columns, mask=columns < vocab, other=-float("inf"))
    _, place = best_of(values, columns)
    tl.store(ids + row, tl.where(tl.abs(best) == float("inf"), -1, place).to(tl.int64))
