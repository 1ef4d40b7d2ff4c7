"""fp8_experts of the released model in decode, a shared expert among them, as CUDA graphs, as in a server: the weights
streamed, DeepGEMM's masked products between the same kernels, and the Triton kernel of very few tokens side by side.

python -m baleen.kernels.fp8_experts.bench_fp8_experts FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import deep_gemm
import torch
from torch import Tensor

from baleen.kernels.bench_timing import BYTES_PER_MS, Result, captured, report, time_all
from baleen.kernels.fp8_experts import deep_gemm as ours
from baleen.kernels.fp8_experts import layout, reference, triton_kernel
from baleen.kernels.fp8_quant import Quantized, quantize_1x128

HIDDEN, WIDTH, TOP_K = 7168, 2048, 8
# Experts, the shared one among them: tokens.
SHAPES = {257: (32, 64, 128), 33: (8, 16, 32, 64, 128)}


def main() -> None:
    ours.FEW_ROWS = 0  # streams whatever the tokens
    verdicts: dict[str, str] = {}
    results = []
    weights = _weights(max(SHAPES))
    for num_experts, batches in SHAPES.items():
        part = [weight[:num_experts] for weight in weights]
        for tokens in batches:
            results.append(_decode(tokens, part, verdicts))
            torch.cuda.empty_cache()
    report("fp8_experts", results, verdicts)


def _weights(num_experts: int) -> list[Tensor]:
    """gate_up, its scales, down, its scales."""
    out = []
    for rows, columns in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        values = torch.empty(num_experts, rows, columns, dtype=torch.float8_e4m3fn, device="cuda")
        for expert in values:
            expert.copy_(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda").mul_(32))
        exponents = torch.randint(-12, -9, (num_experts, rows // 128, columns // 128), device="cuda")
        out += [values, torch.exp2(exponents.float())]
    return out


def _inputs(tokens: int, num_experts: int) -> tuple[Any, Tensor, Tensor]:
    """The last expert has every token."""
    x = quantize_1x128(torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda"))
    ids = torch.rand(tokens, num_experts - 1, device="cuda").topk(TOP_K).indices
    shared = torch.full((tokens, 1), num_experts - 1, device="cuda")
    return x, torch.cat((ids, shared), 1), torch.rand(tokens, TOP_K + 1, device="cuda")


def _by_deep_gemm(
    x: Quantized,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As `ours`, but for the products."""
    num_experts, _, width = down.shape
    expected = -(-expert_ids.numel() // num_experts)
    place = layout.masked(x, expert_ids, num_experts)
    gated = _masked_product(place, place.values, place.scale, gate_up, gate_up_scale, expected)
    values = torch.empty(gated.shape[0], width, dtype=torch.float8_e4m3fn, device="cuda")
    scale = torch.empty(num_experts, width // 128, place.group, dtype=torch.float32, device="cuda")
    triton_kernel.activate(gated, place.rows, expert_ids.numel(), values, scale)
    products = _masked_product(place, values, scale, down, down_scale, expected)
    return triton_kernel.weighted_sum(products, place.rows, expert_weights, dtype)


def _masked_product(
    place: layout.Layout, values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, expected: int
) -> Tensor:
    """[M, rows of the weight]. expected: rows of an expert on average."""
    out = torch.empty(weight.shape[0], place.group, weight.shape[1], dtype=torch.bfloat16, device="cuda")
    rows = values.view(weight.shape[0], place.group, -1)
    deep_gemm.fp8_m_grouped_gemm_nt_masked(
        (rows, scale.transpose(1, 2)), (weight, weight_scale), out, place.ends, expected
    )
    return out.flatten(0, 1)


def _decode(tokens: int, weights: list[Tensor], verdicts: dict[str, str]) -> Result:
    num_experts = weights[0].shape[0]
    inputs = _inputs(tokens, num_experts)
    arguments = (*inputs, *weights, torch.bfloat16)
    touched = inputs[1].unique().numel()
    shape = f"{tokens} tokens, {touched} of {num_experts} experts"
    functions: dict[str, Callable[[], Any]] = {}
    errors = []
    expected = reference.fp8_experts(*arguments).double()
    compared = {"streamed": ours.fp8_experts, "deep_gemm": _by_deep_gemm, "triton": triton_kernel.fp8_experts}
    for name, function in compared.items():
        try:
            replay, out = captured(partial(function, *arguments))
            replay()
            errors.append(f"{name} {float((out.double() - expected).norm() / expected.norm()):.1e}")
            functions[name] = replay
        except Exception as error:  # the others go on
            print(f"{name}: {error}"[:300], flush=True)
    verdicts[f"{shape}, error of the norm"] = ", ".join(errors)
    print(f"{shape}: errors {errors}", flush=True)
    return time_all(Result(shape, touched * 3 * HIDDEN * WIDTH / BYTES_PER_MS), functions)


if __name__ == "__main__":
    main()
