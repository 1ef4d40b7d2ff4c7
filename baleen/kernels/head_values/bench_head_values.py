"""head_values_quant and part_values_quant of the released model in decode: our kernels, and torch.bmm with our
quantisation after it, side by side, as CUDA graphs, as in a server.

python -m baleen.kernels.head_values.bench_head_values FOLDER
"""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, captured, report, time_all
from baleen.kernels.dispatch import available, find
from baleen.kernels.fp8_quant import dequantize_1x128, quantize_1x128
from baleen.kernels.head_values import IMPLEMENTATIONS, reference, triton_kernel
from baleen.kernels.sparse_mla import Parts

HEADS, NOPE, VALUE, LATENT = 128, 128, 128, 512
TOKENS = (1, 16, 64, 128)
PARTS = ((1, 32), (1, 16), (2, 32), (4, 16))  # tokens, parts


def main() -> None:
    kv_b = torch.randn(HEADS, NOPE + VALUE, LATENT, device="cuda").mul_(LATENT**-0.5).bfloat16()
    verdicts: dict[str, str] = {}
    results = [_decode(tokens, kv_b[:, NOPE:], verdicts) for tokens in TOKENS]
    results += [_in_parts(*shape, kv_b[:, NOPE:], verdicts) for shape in PARTS]
    report("head_values", results, verdicts)


def _decode(tokens: int, w_v: Tensor, verdicts: dict[str, str]) -> Result:
    """Times them; their difference into the verdicts."""
    attended = torch.randn(tokens, HEADS, LATENT, device="cuda").bfloat16()
    moved = w_v.numel() * 2 + tokens * HEADS * (LATENT * 2 + VALUE + 4)
    result = Result(f"head_values_quant, {tokens} tokens", moved / BYTES_PER_MS)
    torch_replay, expected = captured(lambda: quantize_1x128(reference.head_values(attended, w_v).flatten(1)))
    triton_replay, got = captured(lambda: triton_kernel.head_values_quant(attended, w_v))
    torch_replay()
    triton_replay()
    right = dequantize_1x128(*expected).double()
    difference = (dequantize_1x128(*got).double() - right).norm() / right.norm()
    verdicts[result.shape] = f"difference of the norm {float(difference):.1e}"
    return time_all(result, {"torch.bmm, quantize_1x128": torch_replay, "triton": triton_replay})


def _in_parts(tokens: int, parts: int, w_v: Tensor, verdicts: dict[str, str]) -> Result:
    """The same of attention in parts."""
    sums = torch.randn(tokens, parts, HEADS, LATENT, device="cuda")
    maxima, totals = torch.randn(2, tokens, parts, HEADS, device="cuda")
    given = Parts(sums, maxima, totals.exp())
    moved = sums.numel() * 4 + w_v.numel() * 2 * tokens
    result = Result(f"part_values_quant, {tokens} tokens in {parts} parts", moved / BYTES_PER_MS)
    right = dequantize_1x128(*reference.part_values_quant(*given, w_v)).double()
    replays = {}
    for name in available(IMPLEMENTATIONS):
        function = find(IMPLEMENTATIONS, name, "part_values_quant")
        assert function is not None
        replays[name], got = captured(lambda function=function: function(*given, w_v))  # type: ignore[misc]
        replays[name]()
        difference = (dequantize_1x128(*got).double() - right).norm() / right.norm()
        verdicts[f"{result.shape}, {name}"] = f"difference of the norm {float(difference):.1e}"
    return time_all(result, replays)


if __name__ == "__main__":
    main()
