"""masked_mha of prefill chunks: 128 heads, each query's mask holding 2048 tokens. Peers: torch's attention by cuDNN and
by FlashAttention (no mask but the causal one), cuDNN with the mask as a bias, and FlashMLA's sparse prefill of as many
queries, which attends in the latent space to the 2048 alone.

python -m baleen.kernels.dense_mla.bench_dense_mla FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from baleen.kernels.bench_timing import Result, correct, report, time_all
from baleen.kernels.dense_mla import IMPLEMENTATIONS, reference
from baleen.kernels.dense_mla.cases import GPU_CASES, pack_bits
from baleen.kernels.dispatch import available, find

HEADS, NOPE, ROPE, VALUE, LATENT, K = 128, 128, 64, 128, 512, 2048
SCALE = (NOPE + ROPE) ** -0.5
SHAPES = ((4096, 0), (8192, 0), (2048, 6144), (4096, 8192))  # queries, start
BF16_FLOPS_PER_MS = 6.86e11  # torch.matmul, 8192^3

Functions = dict[str, Callable[[], Any]]


def main() -> None:
    names = [name for name in available(IMPLEMENTATIONS) if name != "reference"]
    verdicts = correct(IMPLEMENTATIONS, GPU_CASES, names)
    results = []
    for queries, start in SHAPES:
        flops = 2 * HEADS * (NOPE + ROPE + VALUE) * queries * (start + (queries + 1) / 2)
        result = Result(f"{queries} at {start} ({flops / 1e9:.0f} GFLOP)", flops / BF16_FLOPS_PER_MS)
        operands, selection = _operands(queries, start)
        time_all(result, _ours(names, operands, start) | _peers(operands, start) | _flashmla(operands[0], selection))
        rates = {name: round(flops / ms / 1e9) for name, ms in result.ms.items() if isinstance(ms, float)}
        print(f"{result.shape}: TFLOP/s {rates}", flush=True)
        results.append(result)
        del operands, selection
        torch.cuda.empty_cache()
    report("dense_mla", results, verdicts)


def _operands(queries: int, start: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """q, k_nope, k_pe, v, mask words; the selected positions [Q, K] int32, -1 where a query sees fewer."""
    keys = start + queries
    q = _random(queries, HEADS, NOPE + ROPE)
    both = _random(keys, HEADS, NOPE + VALUE)
    words, positions = [], []
    for rows in torch.arange(start, keys, device="cuda").split(1024):
        scores = torch.rand(len(rows), keys, device="cuda")
        scores.masked_fill_(torch.arange(keys, device="cuda") > rows[:, None], -1.0)
        best = scores.topk(min(K, keys))
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device="cuda").scatter_(1, best.indices, best.values >= 0)
        words.append(pack_bits(chosen))
        positions.append(best.indices.int().masked_fill(best.values < 0, -1))
    return (q, both[..., :NOPE], _random(keys, ROPE), both[..., NOPE:], torch.cat(words)), torch.cat(positions)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _ours(names: list[str], operands: tuple[Tensor, ...], start: int) -> Functions:
    functions: Functions = {}
    for name in names:
        function = find(IMPLEMENTATIONS, name, "masked_mha")
        assert function is not None
        functions[name] = lambda function=function: function(*operands, start, SCALE, K)
        functions[f"{name}, causal alone"] = lambda function=function: function(*operands[:4], None, start, SCALE)
    if "gluon" in functions:
        from baleen.kernels.dense_mla import gluon_kernel

        for turns, persistent in ((True, True), (False, False), (True, False)):
            options = {"OPTIONS": {"TAKE_TURNS": turns, "persistent": persistent}}
            label = f"gluon, {'in turns' if turns else 'free'}, {'persistent' if persistent else 'a program a tile'}"
            functions[label] = _with(gluon_kernel, options, functions["gluon"])
        for heads in (2, 32, 128):
            options = {"head_group": lambda num_keys, width, heads=heads: heads}
            functions[f"gluon, {heads} heads at a time"] = _with(gluon_kernel, options, functions["gluon"])
    if "triton" in functions:
        from baleen.kernels.dense_mla import triton_kernel

        for tile in ((128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (64, 128, 4, 2)):
            options = {"OPTIONS": dict(zip(("ROWS", "KEYS", "num_warps", "num_stages"), tile))}
            functions[f"triton {tile}"] = _with(triton_kernel, options, functions["triton"])
    return functions


def _with(module: ModuleType, settings: dict[str, Any], function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with other settings of its module."""

    def run() -> Any:
        kept = {name: getattr(module, name) for name in settings}
        for name, value in settings.items():
            setattr(module, name, value)
        try:
            return function()
        finally:
            for name, value in kept.items():
                setattr(module, name, value)

    return run


def _peers(operands: tuple[Tensor, ...], start: int) -> Functions:
    """The keys put together and the mask expanded beforehand. Without a mask they would not see a prefix as they must:
    only chunks that begin at 0."""
    q, k_nope, k_pe, v, words = operands
    k = torch.cat((k_nope, k_pe[:, None].expand(-1, HEADS, -1)), -1)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    padded = [*heads_first[:2], F.pad(heads_first[2], (0, NOPE + ROPE - VALUE))]
    hidden = ~reference.visible(len(q), len(k), words, start, 0, q.device)[None, None]
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)

    def attend(backend: SDPBackend, tensors: list[Tensor], **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors, scale=SCALE, **options)

        return run

    functions = {"cuDNN, bias": attend(SDPBackend.CUDNN_ATTENTION, heads_first, attn_mask=bias)}
    if start == 0:
        functions["cuDNN, causal"] = attend(SDPBackend.CUDNN_ATTENTION, heads_first, is_causal=True)
        functions["FlashAttention, causal, v padded"] = attend(SDPBackend.FLASH_ATTENTION, padded, is_causal=True)
    return functions


def _flashmla(q: Tensor, selection: Tensor) -> Functions:
    try:
        from flash_mla import flash_mla_sparse_fwd
    except ImportError:
        return {}
    query, rows = _random(len(q), HEADS, LATENT + ROPE), _random(int(selection.max()) + 1, 1, LATENT + ROPE)
    indices = selection[:, None]

    def run() -> Any:
        return flash_mla_sparse_fwd(query, rows, indices, SCALE, LATENT, use_legacy=True, return_log2_lse=False)

    return {"FlashMLA sparse": run}


if __name__ == "__main__":
    main()
