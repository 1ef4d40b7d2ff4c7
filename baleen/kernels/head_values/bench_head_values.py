"""head_values_quant of the released model in decode: our kernel, and torch.bmm with our quantisation after it, side by
side, as CUDA graphs, as in a server.

python -m baleen.kernels.head_values.bench_head_values FOLDER
"""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, captured, report, time_all
from baleen.kernels.fp8_quant import dequantize_1x128, quantize_1x128
from baleen.kernels.head_values import reference, triton_kernel

HEADS, NOPE, VALUE, LATENT = 128, 128, 128, 512
TOKENS = (1, 16, 64, 128)


def main() -> None:
    kv_b = torch.randn(HEADS, NOPE + VALUE, LATENT, device="cuda").mul_(LATENT**-0.5).bfloat16()
    verdicts: dict[str, str] = {}
    report("head_values", [_decode(tokens, kv_b[:, NOPE:], verdicts) for tokens in TOKENS], verdicts)


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


if __name__ == "__main__":
    main()
