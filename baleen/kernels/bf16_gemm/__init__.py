"""Products of bfloat16 whose result stays float32: the LM head, the router's gate, the indexer's head gates.

Imports: kernels.{dispatch,fp8_gemm,pdl}.
"""

from __future__ import annotations

from torch import Tensor

from baleen.kernels.dispatch import Op

IMPLEMENTATIONS = {
    "triton": "baleen.kernels.bf16_gemm.triton_kernel:bf16_gemm",
    "reference": "baleen.kernels.bf16_gemm.reference:bf16_gemm",
}

_bf16_gemm = Op(IMPLEMENTATIONS)


def bf16_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, not rounded to bfloat16 in between: for what chooses between near-equal experts or tokens.

    x        [T, K] bfloat16, or float32, which a CPU serves with
    weight   [N, K] of x's dtype
    returns  [T, N] float32; products and sums are float32
    Error:   rounding; the same every time.
    Cost:    2*T*N*K flops; of few tokens a GPU reads the weight once and has scratch of 4*T*N bytes for each of the
             parts that K is split into, where N is small.
    """
    return _bf16_gemm(x, weight)
