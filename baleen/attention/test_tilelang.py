"""The TileLang kernel, run statement by statement: the stand-in gives each call of the language its documented meaning
on NumPy arrays. A parallel loop runs once, with arrays of indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from baleen.attention.backend import _load
from baleen.attention.test_over_rows import SMALL, check, stand_in

Array = NDArray[Any]


class FakeLanguage:
    """tilelang.language. A kernel is called block by block: `block` is the one that runs, of `grid`."""

    GemmWarpPolicy = SimpleNamespace(FullCol=0)
    serial, min, exp2, if_then_else = range, np.minimum, np.exp2, staticmethod(np.where)

    def __init__(self) -> None:
        self.block = self.grid = 0

    def dynamic(self, name: str) -> str:
        return name

    def Tensor(self, shape: tuple[int | str, ...], dtype: str) -> tuple[tuple[int | str, ...], str]:
        return shape, dtype

    def prim_func(self, body: Callable[..., None]) -> Callable[..., None]:
        shapes = [value for name, value in body.__annotations__.items() if name != "return"]

        def launch(*tensors: Tensor) -> None:
            sizes: dict[str, int] = {}
            for tensor, (shape, dtype) in zip(tensors, shapes, strict=True):
                assert str(tensor.dtype) == f"torch.{dtype}"
                assert tensor.is_contiguous()
                for found, wanted in zip(tensor.shape, shape, strict=True):
                    assert found == (sizes.setdefault(wanted, found) if isinstance(wanted, str) else wanted)
            self.block, self.grid = 0, 1
            while self.block < self.grid:
                body(*(tensor.numpy() for tensor in tensors))
                self.block += 1

        return launch

    @contextmanager
    def Kernel(self, grid: int, threads: int) -> Iterator[int]:
        self.grid = grid
        yield self.block

    def alloc_shared(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.full(shape, 77, dtype)  # nothing is zeroed

    alloc_fragment = alloc_shared

    def ceildiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def Parallel(self, *extents: int) -> Iterator[Any]:
        grids = np.ogrid[tuple(slice(extent) for extent in extents)]
        yield grids if len(extents) > 1 else grids[0]

    def copy(self, source: Array, target: Array) -> None:
        """What lies outside of a tensor is read as 0 and not written."""
        common = tuple(slice(min(a, b)) for a, b in zip(source.shape, target.shape, strict=True))
        if source.shape != target.shape and source.shape == source[common].shape:
            target[...] = 0
        target[common] = source[common]

    def fill(self, target: Array, value: float) -> None:
        target[...] = value

    def clear(self, target: Array) -> None:
        target[...] = 0

    def gemm(self, a: Array, b: Array, c: Array, transpose_B: bool = False, policy: int = 0) -> None:
        c += a @ (b.T if transpose_B else b)

    def reduce_max(self, source: Array, target: Array, dim: int, clear: bool = True) -> None:
        target[...] = source.max(dim) if clear else np.maximum(target, source.max(dim))

    def reduce_sum(self, source: Array, target: Array, dim: int) -> None:
        target[...] = source.sum(dim)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize(("heads", "rows"), [(64, 64), (3, 8)], ids=["one tile", "several tiles"])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str, heads: int, rows: int) -> None:
    """The small model has 4 heads and selects 32 rows."""
    language = FakeLanguage()
    functions = {name: getattr(language, name) for name in dir(language) if not name.startswith("_")}
    fakes = {"tilelang": {"jit": lambda build: build}, "tilelang.language": functions}
    stand_in(monkeypatch, "tilelang", fakes)
    monkeypatch.setattr("baleen.attention.tilelang.BLOCK_HEADS", heads)
    monkeypatch.setattr("baleen.attention.tilelang.BLOCK_ROWS", rows)
    check(_load("tilelang"), case, "float32")
    check(_load("tilelang"), case, "fp8_e4m3")
    assert language.grid
