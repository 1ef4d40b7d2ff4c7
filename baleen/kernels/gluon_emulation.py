"""Gluon on a CPU, for tests: a kernel of copies (TMA), products (wgmma) and mbarriers, run in Python threads.

Each partition of warps is a thread; programs run one after another; layouts are ignored. Everything asynchronous is as
late, and everything that may be overwritten as early, as the hardware may have it: a copy spoils its target when issued
and delivers some time later; a product reads its operands when it is waited for. A buffer reused too early or read too
late gives NaN or other numbers, a lost arrival a deadlock, a wrong number of bytes an error.
"""

from __future__ import annotations

import importlib
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pytest

DEADLOCK_SECONDS = 30.0
LATEST_SECONDS = 0.002  # until a copy delivers, or a product that is waited for has read its operands
_local = threading.local()


def emulated(patch: pytest.MonkeyPatch, *names: str, inline_asm: Callable[..., Any] | None = None) -> Any:
    """The last of the modules named, which import triton and one another, in this order, all imported anew over the
    stand-ins. Undoing `patch` brings those back that were loaded before.

    inline_asm  what inline_asm_elementwise computes, but for programmatic dependent launch and prefetches, which are
                ignored
    """
    for name, module in _modules(inline_asm).items():
        patch.setitem(sys.modules, name, module)
    for name in names:
        package, _, stem = name.rpartition(".")
        parent = importlib.import_module(package)
        # Set first, so that what the import below puts there goes too.
        patch.setitem(sys.modules, name, None)
        patch.delitem(sys.modules, name)
        patch.setattr(parent, stem, None, raising=False)
        patch.delattr(parent, stem)
    return [importlib.import_module(name) for name in names][-1]


class Registers(Tensor):
    """A tensor as a value: `+=` makes another."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        return self + other

    def expand_dims(self, dim: int) -> Tensor:
        return self.unsqueeze(dim)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        """bitcast: of four bytes; torch makes eight of them where a Python number takes part."""
        if not bitcast:
            return super().to(dtype)
        return (super().to(torch.int32) if self.dtype == torch.int64 else self).view(dtype)


class Constant(int):
    @property
    def value(self) -> int:
        return int(self)


@dataclass
class Program:
    """One of a grid; errors of its partitions and of what they started."""

    index: tuple[int, ...]
    grid: tuple[int, ...]
    errors: list[BaseException] = field(default_factory=list)


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.arrived = self.expected = self.phase = 0
        self.program: Program = _local.program

    def _update(self, arrivals: int, nbytes: int) -> None:
        with self.changed:
            self.arrived += arrivals
            self.expected += nbytes
            assert 0 < self.count >= self.arrived, "more arrivals than the phase has"
            if self.arrived == self.count and self.expected == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def arrive(self, count: int) -> None:
        self._update(count, 0)

    def expect(self, nbytes: int, pred: bool = True) -> None:
        if pred:
            self._update(1, nbytes)

    def delivered(self, nbytes: int) -> None:
        with self.changed:
            assert self.expected >= nbytes, "bytes that nobody expects"
            self._update(0, -nbytes)

    def wait(self, parity: int) -> None:
        end = time.monotonic() + DEADLOCK_SECONDS
        with self.changed:
            while not self.changed.wait_for(lambda: self.phase & 1 != parity, 0.2):
                if self.program.errors:
                    raise RuntimeError("another part of the program has failed")
                if time.monotonic() > end:
                    raise TimeoutError("a barrier that nobody completes")


class Buffer:
    """Shared memory, or a view of it."""

    layout = None

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, number: int) -> Buffer:
        return Buffer(self.data[number])

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        return Buffer(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Buffer:
        return Buffer(self.data.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone().as_subclass(Registers)

    def store(self, values: Tensor) -> None:
        assert (self.data.shape, self.data.dtype) == (values.shape, values.dtype)
        self.data.copy_(values)

    def spoil(self) -> None:
        self.data.fill_(torch.nan if self.data.is_floating_point() else 0x55555555)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Buffer:
        return Buffer(self.data.view(dtype).view(shape))


class Barriers(list[Barrier]):
    index = list.__getitem__  # type: ignore[assignment]


class Product:
    """A product in flight. acc: what it adds to, maybe itself in flight."""

    def __init__(self, a: Any, b: Buffer, acc: Any) -> None:
        self.operands = (a, b, acc)
        self.result: Tensor | None = None

    def finish(self) -> None:
        a, b, acc = self.operands
        a = a.data if isinstance(a, Buffer) else a
        acc = acc.result if isinstance(acc, Product) else acc
        self.result = (a.float() @ b.data.float() + (0 if acc is None else acc)).as_subclass(Registers)


@dataclass
class Pointer:
    """Into a tensor; offset: a number, or numbers, of elements."""

    data: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.data.dtype)


def copy_in(descriptor: Any, coordinates: list[int], barrier: Barrier, target: Buffer, pred: bool = True) -> None:
    """The copy engine: zeros outside of the tensor. Delivers in any order, after any time."""
    if not pred:
        return
    assert list(target.data.shape) == list(descriptor.block_shape), "a block of another shape than its target"
    target.spoil()
    source = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    inside = source[tuple(slice(max(at, 0), at + size) for at, size in zip(coordinates, descriptor.block_shape))]
    block = torch.zeros(descriptor.block_shape, dtype=source.dtype)
    block[: inside.shape[0], : inside.shape[1]] = inside

    def deliver() -> None:
        time.sleep(random.random() * LATEST_SECONDS)
        target.data.copy_(block)
        try:
            barrier.delivered(block.numel() * block.element_size())
        except AssertionError as error:
            barrier.program.errors.append(error)

    threading.Thread(target=deliver, daemon=True).start()


def copy_rows(target: Buffer, source: Pointer, mask: Tensor) -> None:
    """cp.async: delivers when the partition waits for its copies."""
    target.spoil()
    _local.copies.append(lambda: target.data.copy_(load(source, mask)))


def wait_for_copies(outstanding: int) -> None:
    assert outstanding == 0
    while _local.copies:
        _local.copies.pop(0)()


def warpgroup_mma(a: Any, b: Buffer, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    product = Product(a, b, acc if use_acc else None)
    _local.in_flight.append(product)
    return product


def warpgroup_mma_wait(outstanding: int, deps: tuple[Product, ...]) -> Any:
    if len(_local.in_flight) > outstanding:
        time.sleep(random.random() * LATEST_SECONDS)
    while len(_local.in_flight) > outstanding:
        _local.in_flight.pop(0).finish()
    results = tuple(product.result for product in deps)
    assert all(result is not None for result in results), "a product that this wait does not cover"
    return results[0] if len(results) == 1 else results


def warp_specialize(
    partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    assert len(warps) == len(registers) == len(partitions) - 1, "those of the first are the kernel's"
    program: Program = _local.program

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _local.program, _local.in_flight, _local.copies = program, [], []
        try:
            function(*arguments)
            assert not _local.in_flight, "a product that nobody waited for"
            assert not _local.copies, "a copy that nobody waited for"
        except BaseException as error:
            program.errors.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK_SECONDS + 10)
    if program.errors:
        raise program.errors[0]


class Kernel:
    """What a jitted function is to its caller."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int = 0, launch_pdl: bool = False, **options: Any) -> None:
            pointers = [Pointer(_memory(x)) if isinstance(x, Tensor) else x for x in arguments]
            for index in itertools.product(*(range(size) for size in grid)):
                _local.program = Program(index, grid)
                self.function(*pointers, **options)

        return launch


def _memory(x: Tensor) -> Tensor:
    """From its first element to the end of what it is a part of."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))


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


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    """One element, or a tensor of them; what the mask leaves out is not looked at."""
    if not isinstance(pointer.offset, Tensor):
        assert 0 <= pointer.offset < pointer.data.numel(), "outside of the tensor"
        return pointer.data[pointer.offset].item()
    inside = torch.ones_like(pointer.offset, dtype=torch.bool) if mask is None else mask.expand_as(pointer.offset)
    offset = pointer.offset[inside]
    assert bool(((offset >= 0) & (offset < pointer.data.numel())).all()), "outside of the tensor"
    values = torch.full(pointer.offset.shape, other, dtype=pointer.data.dtype)
    values[inside] = pointer.data[offset.long()]
    return values.as_subclass(Registers)


def _store(pointer: Pointer, values: Tensor, mask: Tensor | None = None) -> None:
    if not isinstance(pointer.offset, Tensor):
        pointer.data[pointer.offset] = values.as_subclass(Tensor)
        return
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
    offset = pointer.offset.expand_as(values)[mask]
    assert bool((offset >= 0).all()), "before the tensor"
    pointer.data[offset] = values[mask].as_subclass(Tensor)


def _constexpr(value: Any) -> Any:
    return Constant(value) if isinstance(value, int) else value


class Layout(str):
    __slots__ = ()

    @property
    def value(self) -> str:
        return self


def _layout(*arguments: Any) -> Layout:
    return Layout("layout")


def _registers(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*arguments: Any, layout: Any = None, **options: Any) -> Tensor:
        return make(*arguments, **options).as_subclass(Registers)

    return made


def _inline_asm(compute: Callable[..., Any] | None) -> Callable[..., Any]:
    def apply(asm: str, *arguments: Any, **options: Any) -> Any:
        if asm.lstrip("{ ").startswith(("griddepcontrol.", "prefetch.", "mov.u32 $0, 0;")):
            return 0
        assert compute is not None, asm
        return compute(asm, *arguments, **options)

    return apply


def _language(inline_asm: Callable[..., Any] | None) -> dict[str, Any]:
    return {
        "NVMMASharedLayout": _layout, "NVMMADistributedLayout": _layout, "DistributedLinearLayout": _layout,
        "SliceLayout": _layout, "DotOperandLayout": _layout, "BlockedLayout": _layout, "SwizzledSharedLayout": _layout,
         "constexpr": _constexpr, "static_range": range,
        "float32": torch.float32, "bfloat16": torch.bfloat16, "float8e4nv": torch.float8_e4m3fn,
        "int32": torch.int32, "int64": torch.int64, "to_tensor": lambda x: x, "cast": lambda x, dtype: x,
        "program_id": lambda axis: _local.program.index[axis], "num_programs": lambda axis: _local.program.grid[axis],
        "cdiv": lambda a, b: -(-a // b), "exp2": torch.exp2, "zeros_like": torch.zeros_like,
        "load": load, "store": _store, "where": _either(lambda c, a, b: a if c else b, torch.where),
        "minimum": _either(min, torch.minimum), "maximum": _either(max, torch.maximum),
        "arange": _registers(lambda start, end: torch.arange(start, end, dtype=torch.int32)),
        "zeros": _registers(lambda shape, dtype: torch.zeros(shape, dtype=dtype)),
        "full": _registers(lambda shape, value, dtype: torch.full(shape, value, dtype=dtype)),
        "max": torch.amax, "sum": torch.sum, "convert_layout": lambda x, layout, assert_trivial=False: x,
        "reshape": torch.reshape, "split": lambda x: x.unbind(-1), "join": lambda a, b: torch.stack([a, b], -1),
        "thread_barrier": lambda: None,
        "inline_asm_elementwise": _inline_asm(inline_asm), "allocate_shared_memory": _allocate,
        "warp_specialize": warp_specialize,
    }  # fmt: skip


def _modules(inline_asm: Callable[..., Any] | None) -> dict[str, ModuleType]:
    """Stands for every module of triton that kernels import."""
    mbarrier = {
        "MBarrierLayout": lambda: "barrier", "init": lambda barrier, count: setattr(barrier, "count", count),
        "expect": Barrier.expect, "wait": Barrier.wait, "arrive": Barrier.arrive,
    }  # fmt: skip
    hopper = {
        "async_copy": SimpleNamespace(
            async_copy_global_to_shared=copy_rows, commit_group=lambda: None, wait_group=wait_for_copies
        ),
        "mbarrier": SimpleNamespace(**mbarrier), "tma": SimpleNamespace(async_copy_global_to_shared=copy_in),
        "fence_async_shared": lambda: None, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
    }  # fmt: skip

    def descriptor(*fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**dict(zip(("base", "shape", "strides", "block_shape", "layout"), fields)))

    language = SimpleNamespace(**_language(inline_asm))
    gluon = SimpleNamespace(jit=jit, constexpr_function=lambda function: function)
    contents: dict[str, dict[str, Any]] = {
        "triton": {"jit": jit, "cdiv": language.cdiv},
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
