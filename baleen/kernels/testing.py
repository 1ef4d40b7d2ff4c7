"""Holds every implementation of an op to the same cases: against an oracle from outside, or against the reference.

For tests; knows no op. Imports kernels.dispatch.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from baleen.kernels.dispatch import find

Oracle = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One input of one function.

    function    its name in the op's folder
    make        called as make(*parameters, generator), returns the positional arguments of the function
    parameters  shapes, dtypes and whatever else make takes
    rtol, atol  allowed difference of float outputs, as in torch.testing.assert_close; integers, bool and FP8 are
                compared exactly
    flips       of the values of an FP8 output, the share that may be one step of e4m3 off: a sum in another order can
                end across the edge between two roundings. As a scale may flip too, an FP8 tensor followed by its
                scales is compared by the products
    """

    function: str
    make: Callable[..., tuple[Any, ...]]
    parameters: tuple[Any, ...]
    rtol: float = 0.0
    atol: float = 0.0
    flips: float = 0.0

    def __str__(self) -> str:
        return "-".join((self.function, *(_word(parameter) for parameter in self.parameters)))

    def arguments(self) -> tuple[Any, ...]:
        """New tensors at each call, the same numbers."""
        return self.make(*self.parameters, torch.Generator().manual_seed(0))


def _word(parameter: Any) -> str:
    """A parameter as part of a test's name."""
    if isinstance(parameter, list | tuple):
        return "x".join(_word(item) for item in parameter)
    return str(getattr(parameter, "__name__", parameter)).removeprefix("torch.").lstrip("_")


def to_device(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The same tensors on a device, with their strides, and views of one buffer still views of one.

    The memory that the next allocations there get is full of NaN: an output that a kernel forgets to write shows.
    """
    buffers: dict[int, Tensor] = {}

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in buffers:
            buffers[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device)
        moved = buffers[storage.data_ptr()].untyped_storage()
        return torch.empty(0, dtype=leaf.dtype, device=device).set_(
            moved, leaf.storage_offset(), leaf.shape, leaf.stride()
        )

    arguments = tree_map(move, arguments)
    for size in (1 << 12, 1 << 20, 1 << 28):
        torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
    return arguments


def check(
    implementations: Mapping[str, str], name: str, case: Case, oracle: Oracle | None = None, device: str = "cpu"
) -> None:
    """Runs one implementation on one case; AssertionError if it differs from the oracle (None: from the reference).

    Outputs are compared, and the arguments as they are afterwards: what an op stores shows there, and nothing else may.
    An implementation that does not define the case's function has nothing to show. The oracle runs on the CPU.
    """
    function = find(implementations, name, case.function)
    expected_by = oracle or find(implementations, "reference", case.function)
    if function is None or expected_by is None:
        return
    arguments, expected_arguments = case.arguments(), case.arguments()
    if device != "cpu":
        arguments = to_device(arguments, device)
    output, expected = function(*arguments), expected_by(*expected_arguments)
    leaves = zip(tree_leaves((output, arguments)), tree_leaves((expected, expected_arguments)), strict=True)
    pairs = [(got.cpu(), torch.as_tensor(want)) for got, want in leaves if isinstance(got, Tensor)]
    while pairs:
        got, want = pairs.pop(0)
        if not case.flips or got.dtype != torch.float8_e4m3fn:
            assert_close(got, want, case.rtol, case.atol)
        elif pairs and _is_scale(pairs[0][0], got):
            assert_few_flips(got, want, case.flips, *pairs.pop(0))
        else:
            assert_few_flips(got, want, case.flips)


def assert_close(got: Tensor, want: Tensor, rtol: float, atol: float) -> None:
    """As torch.testing.assert_close in float64, NaN equal to NaN; FP8 by value, exactly."""
    if got.dtype == torch.float8_e4m3fn or not got.is_floating_point():
        rtol = atol = 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


def assert_few_flips(
    got: Tensor, want: Tensor, flips: float, got_scale: Tensor | None = None, want_scale: Tensor | None = None
) -> None:
    """FP8 tensors, times scales where given, nowhere more than one step of e4m3 apart, and apart at a share of the
    values of `flips`, of the scales likewise."""
    assert got.shape == want.shape, f"shape {list(got.shape)} for {list(want.shape)}"
    by = want_by = torch.ones(())
    if got_scale is not None and want_scale is not None:
        assert got_scale.shape == want_scale.shape, f"shape {list(got_scale.shape)} for {list(want_scale.shape)}"
        _assert_few(_off(got_scale.double(), want_scale.double()), flips, "scales off")
        by, want_by = _spread(got_scale, got), _spread(want_scale, want)
    a, b = got.double() * by, want.double() * want_by
    _assert_few(_off(a, b), flips, "values off")
    # With scales apart, the smallest values have steps of other sizes.
    step = torch.minimum(_step(got) * by.abs(), _step(want) * want_by.abs()) * 1.01 + (by - want_by).abs() / 512
    _assert_few(_off(a, b) & ~((a - b).abs() <= step), 0, "values more than a step off")


def _step(values: Tensor) -> Tensor:
    """From an e4m3 value to the next larger: 3 bits of mantissa, and 2^-9 at the smallest."""
    return torch.exp2(values.double().frexp().exponent.double() - 4).clamp_min(2.0**-9)


def _off(a: Tensor, b: Tensor) -> Tensor:
    return ~torch.isclose(a, b, rtol=1e-4, atol=0, equal_nan=True)


def _assert_few(off: Tensor, share: float, what: str) -> None:
    count, allowed = int(off.sum()), math.ceil(share * off.numel())
    assert count <= allowed, (
        f"{count} of {off.numel()} {what}, {allowed} allowed; the first at {off.nonzero()[0].tolist()}"
    )


def _is_scale(tensor: Tensor, values: Tensor) -> bool:
    """float32 and one a row of the values, or one for each 128 of a row."""
    *rows, dim = values.shape
    return tensor.dtype == torch.float32 and list(tensor.shape) in (rows, [*rows, -(-dim // 128)])


def _spread(scale: Tensor, values: Tensor) -> Tensor:
    """Scales repeated for each value."""
    if scale.dim() < values.dim():
        return scale.double()[..., None].expand(values.shape)
    return scale.double().repeat_interleave(128, -1)[..., : values.shape[-1]]


class _Allocations(TorchDispatchMode):
    """Remembers the size of every storage that appears as the output of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: dict[int, int] = {}
        self.keep: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.nbytes[storage.data_ptr()] = storage.nbytes()
                # Kept alive, so that no address is used twice.
                self.keep.append(storage)
        return out


def largest_scratch(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of the largest tensor made by function(*args) that is neither an argument nor returned."""
    with _Allocations() as allocations:
        out = function(*args)
    for leaf in tree_leaves((args, out)):
        if isinstance(leaf, Tensor):
            allocations.nbytes.pop(leaf.untyped_storage().data_ptr(), None)
    return max(allocations.nbytes.values(), default=0)


def triton_module(op: str) -> tuple[ModuleType, str]:
    """Triton's implementation of an op, and the device that it runs on here; skips the test where it does not run."""
    import pytest

    module = pytest.importorskip(f"baleen.kernels.{op}.triton_kernel", reason="needs the package triton")
    if torch.cuda.is_available():
        return module, "cuda"
    if not module.triton.knobs.runtime.interpret:
        pytest.skip("needs a CUDA device or Triton's interpreter")
    return module, "cpu"


def run_in_interpreter(file: str, chosen: str) -> None:
    """The body of a test: some tests of its file once more, in a process where Triton interprets its kernels, which is
    chosen at import. Skips without Triton, and in that process. chosen: as pytest's -k takes it
    """
    import pytest  # a benchmark that takes the cases from here has none

    triton = pytest.importorskip("triton", reason="needs the package triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("this is the inner run")
    command = ["env", "TRITON_INTERPRET=1", sys.executable, "-m", "pytest", file, "-k", chosen]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout
