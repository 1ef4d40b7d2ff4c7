"""lm_head against products in float64 and their argmax; the kernels in Triton's interpreter, with float32 in place of
bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.bf16_gemm.cases import product
from baleen.kernels.dispatch import available
from baleen.kernels.lm_head import IMPLEMENTATIONS, lm_head
from baleen.kernels.lm_head.cases import CASES, GPU_CASES, bad_rows, one_left, signs, tied, ties
from baleen.kernels.testing import Case, assert_close, check, run_in_interpreter, to_device, triton_module

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _logits(hidden: Tensor, weight: Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return hidden.double().numpy() @ weight.double().numpy().T


def _in_float64(hidden: Tensor, weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    logits = _logits(hidden, weight)
    without = np.isnan(logits).any(1) | (logits == np.inf).any(1) | (logits == -np.inf).all(1)
    return logits, np.where(without, -1, logits.argmax(1))


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


@pytest.mark.parametrize("case", CASES + GPU_CASES, ids=str)
def test_no_rounding_decides_between_tokens(case: Case) -> None:
    """A row's largest logits are the same number or further apart than what the cases allow."""
    for row in _logits(*case.arguments()):
        largest = np.unique(row[np.isfinite(row)])[-2:]
        assert len(largest) < 2 or largest[1] - largest[0] > 2 * case.atol


def test_what_the_special_cases_have() -> None:
    generator = torch.Generator()
    has_token = [(lm_head(*make(300, 64, torch.float32, generator))[1] >= 0).tolist() for make in (signs, bad_rows)]
    assert has_token == [[False] * 6 + [True], [True] + [False] * 5]
    assert lm_head(*one_left(3, 300, 64, 70, torch.float32, generator))[1].tolist() == [70] * 3
    logits, ids = lm_head(*ties(16, 300, 128, torch.float32, generator))
    assert ids.tolist() == [min(group) for group in tied(300)] * 2
    assert bool((logits <= -1).all())


DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # what the kernels run on here


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_the_triton_kernels_in_their_interpreter() -> None:
    """Their float32 cases once more, where Triton interprets its kernels, which is chosen at import."""
    run_in_interpreter(__file__, "triton and float32 and against_float64 or in_triton")


@pytest.mark.parametrize("config", [(16, 64, 3, 64, 2), (64, 128, 1, 64), (128, 256, 1, 64, 4, 8)])
def test_tiles_of_any_size_in_triton(config: tuple[int, ...]) -> None:
    """Every kind of row in tiles that the cases' default does not take; rows and tokens that fill none."""
    kernel, device = triton_module("lm_head")
    for case in (
        Case("lm_head", product, (101, 300, 136, 8, DTYPE), atol=2e-4),
        Case("lm_head", ties, (20, 300, 136, DTYPE)),
        Case("lm_head", signs, (300, 64, DTYPE), atol=2e-4),
        Case("lm_head", bad_rows, (300, 64, DTYPE), atol=2e-4),
        Case("lm_head", one_left, (5, 300, 64, 299, DTYPE), atol=2e-4),
    ):
        logits, ids = kernel.lm_head(*to_device(case.arguments(), device), kernel.Config(*config))
        expected_logits, expected_ids = _in_float64(*case.arguments())
        assert_close(logits.cpu(), torch.from_numpy(expected_logits), 0.0, case.atol)
        assert ids.tolist() == expected_ids.tolist(), case
        assert (logits.dtype, ids.dtype) == (torch.float32, torch.int64)


def test_more_tiles_than_threads_in_triton() -> None:
    """300, which is no power of two either."""
    kernel, device = triton_module("lm_head")
    arguments = to_device(ties(8, 4800, 128, DTYPE, torch.Generator()), device)
    _, ids = kernel.lm_head(*arguments, kernel.Config(16, 16, 1, 128, 2))
    assert ids.tolist() == [min(group) for group in tied(4800)]


@pytest.mark.parametrize(("rows", "called"), [(100, []), (128, []), (129, ["bf16_gemm", "greedy"])])
def test_more_rows_are_left_to_the_two_ops_in_triton(
    rows: int, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, device = triton_module("lm_head")
    calls = []
    for name in ("bf16_gemm", "greedy"):
        op = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, name=name, op=op: calls.append(name) or op(*args))
    kernel.lm_head(*to_device(product(rows, 70, 64, 0, DTYPE, torch.Generator()), device))
    assert calls == called


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 20, 100])
def test_on_a_gpu_steps_one_after_the_other(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, with early starts: each step's rows are what the ids of the step before chose."""
    pytest.importorskip("triton", reason="needs the package triton")
    from baleen.kernels import pdl

    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(5000, 1024, generator=generator, device="cuda").div(32).bfloat16()
    table = torch.randn(5000, 1024, generator=generator, device="cuda").bfloat16()

    def chain() -> Tensor:
        ids = [torch.arange(rows, device="cuda")]
        for _ in range(8):
            ids.append(lm_head(table[ids[-1]], weight)[1])
        return torch.stack(ids)

    monkeypatch.setattr(pdl, "ENABLED", False)
    expected = chain()
    assert len(expected.unique()) > 4 * rows
    monkeypatch.setattr(pdl, "ENABLED", True)
    graph = torch.cuda.CUDAGraph()
    chain()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        captured.fill_(-2)
        graph.replay()
        assert torch.equal(captured, expected)
