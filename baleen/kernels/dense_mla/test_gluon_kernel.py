"""The Gluon kernel run in Python threads, one for each group of warps: what it computes, and its protocol.

Everything asynchronous is as late, and everything that may be overwritten as early, as the hardware may have it: a copy
spoils its target when issued and delivers some time later; a product reads its operands when it is waited for. A
buffer reused too early or read too late gives NaN or other numbers, a lost arrival a deadlock.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.kernels import dense_mla
from baleen.kernels.dense_mla import reference
from baleen.kernels.dense_mla.cases import masked
from baleen.kernels.testing import assert_close

DEADLOCK_SECONDS = 30.0
_local = threading.local()


class Constant(int):
    @property
    def value(self) -> int:
        return int(self)


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.arrived = self.expected = self.phase = 0

    def _update(self, arrivals: int, nbytes: int) -> None:
        with self.changed:
            self.arrived += arrivals
            self.expected += nbytes
            assert 0 < self.count >= self.arrived, "more arrivals than the phase has"
            if self.arrived == self.count and self.expected == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def expect(self, nbytes: int) -> None:
        self._update(1, nbytes)

    def delivered(self, nbytes: int) -> None:
        with self.changed:
            assert self.expected >= nbytes, "bytes that nobody expects"
        self._update(0, -nbytes)

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, DEADLOCK_SECONDS):
                raise TimeoutError("a barrier that nobody completes")


class Buffer:
    """Shared memory, or a view of it; `layout` says what the copy engine and the products make of it."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, number: int) -> Buffer:
        return Buffer(self.data[number])

    def permute(self, order: tuple[int, ...]) -> Buffer:
        return Buffer(self.data.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def spoil(self) -> None:
        self.data.fill_(torch.nan if self.data.is_floating_point() else 0x55555555)


class Barriers(list[Barrier]):
    index = list.__getitem__  # type: ignore[assignment]


class Product:
    """A product in flight. acc: what it adds to, maybe itself in flight."""

    def __init__(self, a: Any, b: Buffer, acc: Any) -> None:
        self.operands, self.result = (a, b, acc), None

    def finish(self) -> None:
        a, b, acc = self.operands
        a = a.data if isinstance(a, Buffer) else a
        acc = acc.result if isinstance(acc, Product) else acc
        self.result = a.float() @ b.data.float() + (0 if acc is None else acc)


@dataclass
class Pointer:
    data: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


def copy_in(descriptor: Any, coordinates: list[int], barrier: Barrier, target: Buffer) -> None:
    """The copy engine: zeros outside of the tensor. Delivers in any order, after any time."""
    target.spoil()
    source = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    inside = source[tuple(slice(max(at, 0), at + size) for at, size in zip(coordinates, descriptor.block_shape))]
    block = torch.zeros(descriptor.block_shape, dtype=source.dtype)
    block[: inside.shape[0], : inside.shape[1]] = inside

    def deliver() -> None:
        time.sleep(random.random() * 0.002)
        target.data.copy_(block)
        barrier.delivered(block.numel() * block.element_size())

    threading.Thread(target=deliver, daemon=True).start()


def warpgroup_mma(a: Any, b: Buffer, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    _local.in_flight.append(Product(a, b, acc if use_acc else None))
    return _local.in_flight[-1]


def warpgroup_mma_wait(outstanding: int, deps: tuple[Product, ...]) -> Any:
    while len(_local.in_flight) > outstanding:
        _local.in_flight.pop(0).finish()
    results = tuple(product.result for product in deps)
    assert all(result is not None for result in results), "a product that this wait does not cover"
    return results[0] if len(results) == 1 else results


def warp_specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    errors: list[BaseException] = []
    program = _local.program

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _local.program, _local.in_flight = program, []
        try:
            function(*arguments)
            assert not _local.in_flight, "a product that nobody waited for"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK_SECONDS + 10)
    if errors:
        raise errors[0]


class Kernel:
    """What a jitted function is to its caller."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **options: Any) -> None:
            pointers = [Pointer(x.view(-1)) if isinstance(x, Tensor) else x for x in arguments]
            for program in range(grid[0]):
                _local.program = (program, grid[0])
                self.function(*pointers, **options)

        return launch


def jit(function: Any = None, **options: Any) -> Any:
    return Kernel(function) if function is not None else Kernel


def _either(scalar: Callable[..., Any], tensor: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*arguments: Any) -> Any:
        tensors = any(isinstance(x, Tensor) for x in arguments)
        return tensor(*(torch.as_tensor(x) for x in arguments)) if tensors else scalar(*arguments)

    return apply


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) == 2 else Barrier()
    buffer = Buffer(torch.empty(shape, dtype=dtype))
    buffer.spoil()
    return buffer


def _select(asm: str, constraints: str, arguments: list[Tensor], **options: Any) -> Tensor:
    assert "and.b32 bit, $2, $3" in asm
    assert "selp.f32 $0, $1, 0fFF800000, chosen" in asm
    scores, shifted, tested = arguments
    return scores.masked_fill(shifted & tested == 0, -torch.inf)


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    mask = mask.expand_as(values)
    pointer.data[pointer.offset.expand_as(values)[mask]] = values[mask]


def _constexpr(value: Any) -> Any:
    return Constant(value) if isinstance(value, int) else value


def _layout(*arguments: Any) -> str:
    return "layout"


def _modules() -> dict[str, ModuleType]:
    """Stands for every module of triton that the two kernels import."""
    gl: dict[str, Any] = {
        "NVMMASharedLayout": _layout, "NVMMADistributedLayout": _layout, "DistributedLinearLayout": _layout,
        "SliceLayout": _layout, "DotOperandLayout": _layout, "constexpr": _constexpr, "static_range": range,
        "float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64,
        "program_id": lambda axis: _local.program[0], "num_programs": lambda axis: _local.program[1],
        "cdiv": lambda a, b: -(-a // b), "exp2": torch.exp2, "zeros_like": torch.zeros_like, "store": _store,
        "where": _either(lambda c, a, b: a if c else b, torch.where),
        "minimum": _either(min, torch.minimum), "maximum": _either(max, torch.maximum),
        "arange": lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        "max": torch.amax, "sum": torch.sum, "convert_layout": lambda x, layout, assert_trivial=False: x,
        "inline_asm_elementwise": _select, "allocate_shared_memory": _allocate, "warp_specialize": warp_specialize,
    }  # fmt: skip
    mbarrier = {
        "MBarrierLayout": lambda: "barrier", "init": lambda barrier, count: setattr(barrier, "count", count),
        "expect": Barrier.expect, "wait": Barrier.wait, "arrive": lambda barrier, count: barrier._update(count, 0),
    }  # fmt: skip
    hopper = {
        "mbarrier": SimpleNamespace(**mbarrier), "tma": SimpleNamespace(async_copy_global_to_shared=copy_in),
        "fence_async_shared": lambda: None, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
    }  # fmt: skip

    def descriptor(*fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**dict(zip(("base", "shape", "strides", "block_shape", "layout"), fields)))

    language, gluon = SimpleNamespace(**gl), SimpleNamespace(jit=jit, constexpr_function=lambda function: function)
    contents = {
        "triton": {"jit": jit, "cdiv": gl["cdiv"]},
        "triton.language": {},
        "triton.tools": {},
        "triton.tools.tensor_descriptor": {"TensorDescriptor": descriptor},
        "triton.experimental": {"gluon": gluon},
        "triton.experimental.gluon": {"language": language},
        "triton.experimental.gluon.language": {},
        "triton.experimental.gluon.language.nvidia": {},
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia": {},
        "triton.experimental.gluon.nvidia.hopper": {"TensorDescriptor": descriptor},
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name] = ModuleType(name)
        modules[name].__dict__.update(attributes)
    return modules


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """baleen.kernels.dense_mla.gluon_kernel over the modules above; the true one, if loaded, is back afterwards."""
    stems = ("triton_kernel", "gluon_kernel")
    names = [f"{dense_mla.__name__}.{stem}" for stem in stems]
    with monkeypatch.context() as patch:
        for name, module in _modules().items():
            patch.setitem(sys.modules, name, module)
        for stem, name in zip(stems, names):
            # Set first, so that what the import below puts there goes too.
            patch.setitem(sys.modules, name, None)
            patch.delitem(sys.modules, name)
            patch.setattr(dense_mla, stem, None, raising=False)
            patch.delattr(dense_mla, stem)
        patch.setattr(Tensor, "expand_dims", Tensor.unsqueeze, raising=False)
        module = importlib.import_module(names[1])
        patch.setattr(module, "_fits", lambda *arguments: True)
        yield module


@pytest.mark.parametrize("take_turns", [False, True])
@pytest.mark.parametrize(("programs", "persistent"), [(1, True), (4, True), (1, False)])
@pytest.mark.parametrize(
    ("queries", "start", "heads", "k", "kind"),
    [
        (300, 0, 2, 100, "future"),
        (300, 0, 2, 100, "dense rows"),
        (130, 200, 3, 290, "dense rows"),
        (130, 200, 2, 400, "dense rows"),
        (140, 385, 1, 9, "future"),
        (1, 0, 1, 1, "mask"),
        (129, 254, 2, 50, "no mask"),
        (256, 256, 1, 0, "heads first"),
    ],
)
def test_against_the_reference(
    kernel: Any, queries: int, start: int, heads: int, k: int, kind: str, programs: int, persistent: bool,
    take_turns: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = masked(queries, start, heads, (128, 64, 128), k, kind, torch.Generator().manual_seed(queries))
    monkeypatch.setattr(kernel, "_num_sms", lambda device: programs)
    monkeypatch.setattr(kernel, "OPTIONS", {"TAKE_TURNS": take_turns, "persistent": persistent})
    assert_close(kernel.masked_mha(*arguments), reference.masked_mha(*arguments), rtol=2**-7, atol=4e-3)
