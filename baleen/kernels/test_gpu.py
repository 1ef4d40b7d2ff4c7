"""Every implementation that loads, on a GPU, on its op's cases, against the reference on the CPU.

Memory is full of NaN before each call. A GPU sums in another order, and its FP8 units keep about 14 bits of a sum, so
errors are measured against the largest magnitude of the output; the cases' own tolerances are for a CPU.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import baleen.kernels
from baleen.kernels.dispatch import available, find
from baleen.kernels.testing import Case, to_device

OPS = sorted(
    module.name for module in pkgutil.iter_modules(baleen.kernels.__path__) if module.ispkg and module.name[0] != "_"
)
# Largest error over the largest magnitude, by op, else by dtype. Between the products of an expert each of 128 values
# may fall to the next e4m3 step, an eighth of it away: 0.059 seen, while the error of the norm stays under 0.005.
BOUNDS = {"fp8_gemm": 1e-2, "fp8_experts": 8e-2, "index_logits": 1e-3}
TWO_ULPS = {torch.bfloat16: 2**-6, torch.float32: 1e-4}
# How many FP8 values and scales may be others than the reference's: what was rounded to bfloat16 before may have been
# rounded the other way.
FLIPPED = 0.02


def _implementations() -> list[tuple[str, str]]:
    return [(op, name) for op in OPS for name in import_module(f"baleen.kernels.{op}").IMPLEMENTATIONS]


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name"), _implementations())
def test_implementation(op: str, name: str, record_property: Any) -> None:
    listed = import_module(f"baleen.kernels.{op}").IMPLEMENTATIONS
    if not available({name: listed[name]}):
        pytest.skip("needs a library that is not installed")
    worst: dict[str, float] = {}
    failures = []
    for case in import_module(f"baleen.kernels.{op}.cases").CASES:
        if find(listed, name, case.function) is None:
            continue
        try:
            error = compare(listed, op, name, case)
            worst[case.function] = max(error, worst.get(case.function, 0.0))
        except (AssertionError, RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
            failures.append(f"{case}: {type(problem).__name__}: {problem}"[:400])
    for function, error in worst.items():
        record_property(function, f"{error:.2g}")
    assert not failures, "\n".join([f"{len(failures)} cases", *failures[:8]])


def compare(listed: dict[str, str], op: str, name: str, case: Case) -> float:
    """The error of an implementation on a case; AssertionError if it is too large."""
    function, reference = find(listed, name, case.function), find(listed, "reference", case.function)
    assert function is not None
    assert reference is not None
    arguments, expected_arguments = to_device(case.arguments(), "cuda"), case.arguments()
    got = tree_leaves((function(*arguments), arguments))
    want = tree_leaves((reference(*expected_arguments), expected_arguments))
    return max(
        (difference(op, a.cpu(), b) for a, b in zip(got, want, strict=True) if isinstance(a, Tensor)), default=0.0
    )


def difference(op: str, got: Tensor, want: Tensor) -> float:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    if want.dtype == torch.float8_e4m3fn or _is_scale(want):
        flipped = int((got.float() != want.float()).sum())
        assert flipped <= max(2, FLIPPED * want.numel()), f"{flipped} of {want.numel()} FP8 values or scales differ"
        return flipped / want.numel()
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} integers differ"
        return 0.0
    assert torch.equal(got.isfinite(), want.isfinite()), "NaN or infinity where the reference has none, or none there"
    bound = BOUNDS.get(op, TWO_ULPS.get(want.dtype, 0.0))
    exact, found = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (want, got))
    error = float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
    assert error <= bound, f"error {error:.2g} of the largest value, allowed {bound:.2g}"
    return error


def _is_scale(values: Tensor) -> bool:
    """True if every number is a power of two, as FP8 scales are."""
    return values.dtype == torch.float32 and bool((values.frexp().mantissa == 0.5).all())


def test_ops_are_found() -> None:
    assert {"topk", "index_logits", "fp8_gemm", "rms_norm"} <= set(OPS)
    assert ("topk", "reference") in _implementations()


def test_an_error_beyond_its_bound_is_found() -> None:
    want = torch.linspace(-3, 3, 50)
    assert difference("topk", want + 1e-5, want) < 1e-5
    assert difference("topk", want.bfloat16(), want.bfloat16() + 0.0) == 0.0
    nan = want.clone()
    nan[3] = torch.nan
    assert difference("topk", nan, nan) == 0.0
    flipped = torch.ones(200).to(torch.float8_e4m3fn)
    flipped[:3] = 2.0
    assert difference("fp8_quant", flipped, torch.ones(200).to(torch.float8_e4m3fn)) == 3 / 200
    for got, right in ((want + 1e-2, want), (nan, want), (torch.arange(3), torch.tensor([0, 2, 2]))):
        with pytest.raises(AssertionError):
            difference("topk", got, right)
