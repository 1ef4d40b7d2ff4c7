"""bf16_gemm against products in float64; the kernel in Triton's interpreter, with float32 in place of bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.bf16_gemm import IMPLEMENTATIONS, bf16_gemm
from baleen.kernels.bf16_gemm.cases import CASES, GPU_CASES, product
from baleen.kernels.dispatch import available
from baleen.kernels.testing import Case, assert_close, check, run_in_interpreter, to_device, triton_module

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # what the kernels run on here
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _in_float64(x: Tensor, weight: Tensor) -> np.ndarray:
    return x.double().numpy() @ weight.double().numpy().T


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_float64(implementation: str, case: Case) -> None:
    """On a CPU nothing but float32 sums is between them."""
    check(IMPLEMENTATIONS, implementation, replace(case, atol=1e-5), _in_float64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES + GPU_CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_float64(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, _in_float64, device="cuda")


@pytest.mark.parametrize("case", [case for case in CASES if case.parameters[0]], ids=str)
def test_the_tolerance_shows_a_rounded_result(case: Case) -> None:
    got = bf16_gemm(*case.arguments())
    assert got.dtype == torch.float32
    with pytest.raises(AssertionError):
        assert_close(got.bfloat16().float(), torch.from_numpy(_in_float64(*case.arguments())), case.rtol, case.atol)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_the_triton_kernel_in_its_interpreter() -> None:
    """Its float32 cases once more, where Triton interprets its kernels, chosen at import: it multiplies no bfloat16."""
    run_in_interpreter(__file__, "triton and float32 and float64 or in_triton")


@pytest.mark.parametrize(
    "config",
    [(16, 64, 1), (16, 64, 3, 256, 2), (16, 128, 5, 64), (16, 256, 2, 64, 3, 8), (32, 64, 5), (64, 64, 2, 128, 3, 8)],
)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 320, 896), (21, 320, 896), (100, 200, 1416)])
def test_parts_of_k_and_tiles_of_any_size_in_triton(t: int, n: int, k: int, config: tuple[int, ...]) -> None:
    """Rows of the weight and of x that fill no tile, columns that fill no step; the result is the same each time, and
    the counters are zeros again."""
    triton_kernel, device = triton_module("bf16_gemm")
    case = Case("bf16_gemm", product, (t, n, k, 8, DTYPE), atol=2e-4)
    arguments = to_device(case.arguments(), device)
    results = [triton_kernel.bf16_gemm(*arguments, triton_kernel.Config(*config)) for _ in range(2)]
    assert_close(results[0].cpu(), torch.from_numpy(_in_float64(*case.arguments())), case.rtol, case.atol)
    assert torch.equal(results[0], results[1])
    assert not bool(triton_kernel.counters_of(arguments[0].device).zeros.any())


@pytest.mark.parametrize("config", [(16, 64, 1, 64), (16, 64, 3, 64, 2), (32, 128, 1, 64)])
def test_the_largest_of_each_tile_in_triton(config: tuple[int, ...]) -> None:
    """Also of the last tile, which is not full; NaN where there is one; nothing for rows that x does not have."""
    triton_kernel, device = triton_module("bf16_gemm")
    x, weight = product(21, 200, 136, 0, DTYPE, torch.Generator())
    weight[:, 0], weight[70, 3], x[:, 0], x[4] = -1, torch.nan, 9, torch.nan
    tiles = -(-200 // config[1])
    largest = torch.full((64, tiles), 7.0, device=device)
    out = triton_kernel.multiply(x.to(device), weight.to(device), triton_kernel.Config(*config), largest[:21])
    assert_close(largest[:21].cpu(), torch.stack([tile.amax(1) for tile in out.cpu().split(config[1], 1)], 1), 0, 0)
    assert bool((largest[21:] == 7).all())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 48])
def test_on_a_gpu_products_at_the_same_time(tokens: int) -> None:
    """On two streams, captured, each product of a stream on what the one before wrote."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 1024, generator=generator).bfloat16()
    weights = torch.randn(2, 1024, 1024, generator=generator).div(32).bfloat16()
    expected = [[rows] for rows in x]
    for _ in range(8):
        for stream, weight in enumerate(weights):
            product_in_float32 = expected[stream][-1].float() @ weight.float().T
            expected[stream].append(product_in_float32.bfloat16())
    rows, factors = list(x.cuda()), list(weights.cuda())

    def chain(stream: int) -> Tensor:
        out = rows[stream]
        for _ in range(8):
            out = bf16_gemm(out, factors[stream]).bfloat16()
        return out

    second = torch.cuda.Stream()
    for stream in range(2):
        chain(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(second):
            beside = chain(1)
        results = [chain(0), beside]
        torch.cuda.current_stream().wait_stream(second)
    for _ in range(20):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for result, steps in zip(results, expected):
            # Roundings to bfloat16 between products may fall either way.
            assert_close(result.cpu(), steps[-1], 2**-5, 2**-5)
