"""The Hopper kernels on a CPU, in an emulation of Gluon, against the reference.

The emulation runs one program after another and ignores layouts. What is asynchronous happens as late as it may, and
what a GPU would not forgive is an error: a tile that the tensor cores read before all of it was written, fenced and
passed a barrier, or one overwritten while they read it.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from baleen import kernels
from baleen.kernels import gluon_emulation, sparse_mla
from baleen.kernels.kv_store.cases import latent_views
from baleen.kernels.sparse_mla import reference
from baleen.kernels.sparse_mla.cases import CASES, fp8_attention, int32_attention
from baleen.kernels.testing import Case, assert_close


class Value:
    """A tensor or scalar in registers."""

    type = SimpleNamespace(layout=None)

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, key: Any) -> Value:
        return Value(self.data[key])

    def __index__(self) -> int:
        return int(self.data)


def _raw(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def _binary(function: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[Any, Any], Any]:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return other + self
        a, b = _raw(self), _raw(other)
        return Value(function(b, a) if swapped else function(a, b))

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "and", "or", "lshift", "ge", "lt", "gt"):
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(Value, f"__{_name}__", _binary(_function))
    setattr(Value, f"__r{_name}__", _binary(_function, swapped=True))


class Pointer:
    """Addresses in the memory of one tensor, in elements."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset

    @classmethod
    def to_start(cls, tensor: Tensor) -> Pointer:
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        memory = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (size,), (1,))
        return cls(memory, tensor.storage_offset())

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + _raw(other))

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.offset[key])

    def read(self, mask: Value | None, other: Any = 0) -> Tensor:
        offset = torch.as_tensor(self.offset)
        if mask is None:
            return self.memory[offset]
        offset, allowed = torch.broadcast_tensors(offset, mask.data)
        kept = self.memory[offset.where(allowed, 0)]
        return kept.where(allowed, torch.tensor(other, dtype=self.memory.dtype))

    def write(self, value: Value, mask: Value) -> None:
        offset, allowed, data = torch.broadcast_tensors(torch.as_tensor(self.offset), mask.data, value.data)
        self.memory[offset[allowed]] = data[allowed].to(self.memory.dtype)


class Machine:
    """What of one program is under way. States of written tiles: flying, written, fenced; then none."""

    def __init__(self) -> None:
        self.program = (0, 0)
        self.grid = (1, 1)
        self.copies: list[Callable[[], Any]] = []
        self.products: list[Product] = []
        self.writes: dict[tuple[int, int], str] = {}
        self.reads: dict[tuple[int, int], str] = {}

    def written(self, tile: Shared, state: str) -> None:
        assert not self._overlapping(self.reads, tile), "overwritten while or just after the tensor cores read it"
        self.writes[tile.span()] = state

    def readable(self, tile: Shared) -> None:
        assert not self._overlapping(self.writes, tile), "the tensor cores would not see all that was written"
        self.reads[tile.span()] = "reading"

    @staticmethod
    def _overlapping(spans: dict[tuple[int, int], str], tile: Shared) -> bool:
        start, end = tile.span()
        return any(a < end and start < b for a, b in spans)

    def step(self, states: dict[tuple[int, int], str], before: str, after: str | None) -> None:
        for span in [span for span, state in states.items() if state == before]:
            if after is None:
                del states[span]
            else:
                states[span] = after

    def barrier(self) -> None:
        self.step(self.writes, "fenced", None)
        self.step(self.reads, "read", None)


MACHINE = Machine()


class Shared:
    """A tile in shared memory, or some of them."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def span(self) -> tuple[int, int]:
        return self.data.data_ptr(), self.data.data_ptr() + self.data.numel() * self.data.element_size()

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert value.data.dtype == self.data.dtype
        MACHINE.written(self, "written")
        self.data.copy_(value.data)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.data.view(dtype).view(shape))


class Product:
    """A matrix product under way, or done."""

    def __init__(self, a: Shared | Value, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands = [operand for operand in (a, b) if isinstance(operand, Shared)]
        self.acc, self.use_acc = acc, use_acc
        self.before = a.data.clone(), b.data.clone()
        self.result: Value | None = None
        for operand in self.operands:
            MACHINE.readable(operand)

    def finish(self) -> None:
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        product = self.before[0].float() @ self.before[1].float()
        self.result = Value(product + acc.data if self.use_acc else product)
        still = {operand.span() for product in MACHINE.products for operand in product.operands}
        for operand in self.operands:
            if operand.span() not in still:
                MACHINE.reads[operand.span()] = "read"


def _multiply(a: Shared | Value, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    MACHINE.products.append(product)
    return product if is_async else _wait_products(0, (product,))


def _wait_products(outstanding: int, deps: tuple[Product, ...]) -> Value:
    while len(MACHINE.products) > outstanding:
        MACHINE.products.pop(0).finish()
    (product,) = deps
    assert product.result is not None, "not done yet"
    return product.result


def _start_copy(target: Shared, source: Pointer, mask: Value) -> None:
    MACHINE.written(target, "flying")
    target.data.fill_(torch.nan)
    MACHINE.copies.append(lambda: target.data.copy_(source.read(mask)))


def _wait_copies(outstanding: int) -> None:
    assert outstanding == 0
    while MACHINE.copies:
        MACHINE.copies.pop(0)()
    MACHINE.step(MACHINE.writes, "flying", "written")


def _load(source: Pointer, mask: Value | None = None, other: Any = 0) -> Value:
    return Value(source.read(mask, other))


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    data = torch.empty([int(n) for n in shape], dtype=dtype)
    data.view(torch.uint8).fill_(0xFF)
    return Shared(data)


def _halves(words: Tensor) -> Tensor:
    """uint32 in int64 [..] -> bfloat16 [.., 2]"""
    return torch.stack([words & 0xFFFF, words >> 16], -1).to(torch.int32).to(torch.int16).view(torch.bfloat16)


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    out = torch.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            bits = [x if row >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            out |= bits[0] & bits[1] & bits[2]
    return out & 0xFFFFFFFF


def _prmt(a: Tensor, b: Tensor, selector: int) -> Tensor:
    source = a | b << 32
    return sum(((source >> 8 * (selector >> 4 * i & 7)) & 0xFF) << 8 * i for i in range(4))


def _mul_bf16x2(a: Tensor, b: Tensor) -> Tensor:
    bits = (_halves(a) * _halves(b)).view(torch.int16).to(torch.int64) & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


_INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "shr.b32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: (a << n) & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mul.rn.bf16x2": _mul_bf16x2,
}


def run_assembly(text: str, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """PTX on 32-bit words, $2 on, with two results."""
    registers = {f"${2 + i}": argument.long() & 0xFFFFFFFF for i, argument in enumerate(arguments)}
    for line in text.strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            registers[target] = _INSTRUCTIONS[name](*(registers[s] if s in registers else int(s, 0) for s in sources))
    shape = arguments[0].shape
    low, high = (registers[name].to(torch.int32).expand(shape) for name in ("$0", "$1"))
    return low, high


def emulated_assembly(text: str, constraints: str, arguments: list[Tensor], **options: Any) -> Any:
    """For gluon_emulation. Its other instruction makes two bfloat16 of a float32."""
    if text.startswith("cvt.rn.bf16x2.f32"):
        bits = arguments[0].bfloat16().view(torch.int16).long() & 0xFFFF
        return (bits | bits << 16).to(torch.int32).as_subclass(gluon_emulation.Registers)
    return tuple(x.as_subclass(gluon_emulation.Registers) for x in run_assembly(text, *arguments))


def _assembly(text: str, constraints: str, arguments: list[Value], **options: Any) -> tuple[Value, Value] | None:
    """A permission to the next kernel has no result."""
    if text.startswith("griddepcontrol.launch_dependents;"):
        return None
    low, high = run_assembly(text, *(argument.data for argument in arguments))
    return Value(low), Value(high)


class _Constexpr(int):
    value = property(int)


class _Kernel:
    """A jitted function: callable from others, or launched over a grid."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            pointers = [Pointer.to_start(arg) if isinstance(arg, Tensor) else arg for arg in args]
            for x in range(grid[0]):
                for y in range(grid[1]):
                    MACHINE.__init__()
                    MACHINE.program, MACHINE.grid = (x, y), grid
                    self.function(*pointers, **constants)
                    assert not MACHINE.copies, "the program ended under a copy"

        return launch


def _language() -> ModuleType:
    gl = ModuleType("triton.experimental.gluon.language")
    for name in ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout"):
        setattr(gl, name, lambda *args: SimpleNamespace(value=None))
    for name in ("int16", "int32", "int64", "float32", "bfloat16"):
        setattr(gl, name, getattr(torch, name))
    functions = {
        "constexpr": lambda x: _Constexpr(x) if isinstance(x, int) else x,
        "program_id": lambda axis: Value(torch.tensor(MACHINE.program[axis])),
        "num_programs": lambda axis: MACHINE.grid[axis],
        "arange": lambda start, end, layout: Value(torch.arange(start, end)),
        "full": lambda shape, value, dtype, layout: Value(torch.full([int(n) for n in shape], value, dtype=dtype)),
        "zeros": lambda shape, dtype, layout: Value(torch.zeros([int(n) for n in shape], dtype=dtype)),
        "load": _load,
        "store": lambda target, value, mask: target.write(value, mask),
        "where": lambda condition, a, b: Value(torch.where(condition.data, _raw(a), _raw(b))),
        "maximum": lambda a, b: Value(torch.maximum(torch.as_tensor(_raw(a)), torch.as_tensor(_raw(b)))),
        "minimum": lambda a, b: Value(torch.minimum(torch.as_tensor(_raw(a)), torch.as_tensor(_raw(b)))),
        "exp2": lambda x: Value(torch.exp2(x.data)),
        "max": lambda x, axis: Value(x.data.amax(axis)),
        "sum": lambda x, axis: Value(x.data.sum(axis)),
        "reshape": lambda x, shape: Value(x.data.reshape([int(n) for n in shape])),
        "join": lambda a, b: Value(torch.stack([a.data, b.data], -1)),
        "convert_layout": lambda x, layout: x,
        "allocate_shared_memory": _allocate,
        "inline_asm_elementwise": _assembly,
        "thread_barrier": MACHINE.barrier,
    }
    for name, function in functions.items():
        setattr(gl, name, function)
    return gl


def _modules() -> dict[str, ModuleType]:
    gluon, hopper = ModuleType("triton.experimental.gluon"), ModuleType("hopper")
    language = _language()
    vars(gluon).update(jit=_Kernel, language=language)
    vars(hopper).update(
        async_copy=SimpleNamespace(
            async_copy_global_to_shared=_start_copy, commit_group=lambda: None, wait_group=_wait_copies
        ),
        fence_async_shared=lambda: MACHINE.step(MACHINE.writes, "written", "fenced"),
        warpgroup_mma=_multiply,
        warpgroup_mma_wait=_wait_products,
    )
    names = ("triton", "triton.experimental")
    return {name: ModuleType(name) for name in names} | {
        gluon.__name__: gluon,
        language.__name__: language,
        f"{language.__name__}.nvidia": ModuleType("nvidia"),
        f"{language.__name__}.nvidia.hopper": hopper,
    }


def _emulated(source: str) -> ModuleType:
    """The module gluon_kernel with this source, to be launched as usual."""
    with mock.patch.dict(sys.modules, _modules()):
        for name in SHARED:
            path = Path(__file__).parents[3] / name.replace(".", "/")
            sys.modules[name] = _executed(name, path.with_suffix(".py").read_text())
        with mock.patch.object(kernels, "pdl_gluon", sys.modules[SHARED[0]], create=True):
            return _executed("gluon_kernel", source)


def _executed(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


class _FakeTriton(ModuleType):
    """In the place of triton_kernel: adds up parts, and remembers what it was handed."""

    def __init__(self) -> None:
        super().__init__("baleen.kernels.sparse_mla.triton_kernel")
        self.calls: list[str] = []
        self.sparse_mla, self.sparse_mla_fp8 = self._record("sparse_mla"), self._record("sparse_mla_fp8")

    def _record(self, name: str) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            self.calls.append(name)
            return getattr(reference, name)(*arguments)

        return run

    def combine(self, sums: Tensor, maxima: Tensor, totals: Tensor, out: Tensor) -> None:
        self.calls.append("combine")
        weights = torch.exp2(maxima - maxima.amax(1, keepdim=True))
        total = (weights * totals).sum(1)[..., None]
        out.copy_((weights[..., None] * sums).sum(1) / torch.where(total > 0, total, 1.0))


SOURCE = (Path(__file__).parent / "gluon_kernel.py").read_text()
SHARED = ("baleen.kernels.pdl_gluon", "baleen.kernels.sparse_mla.gluon_rows")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module hopper, its kernels emulated."""
    folder = "baleen.kernels.sparse_mla"
    gluon_emulation.emulated(monkeypatch, *SHARED, f"{folder}.gluon_fp8", inline_asm=emulated_assembly)
    fakes = {f"{folder}.gluon_kernel": _emulated(SOURCE), f"{folder}.triton_kernel": _FakeTriton()}
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sparse_mla, name.split(".")[-1], module, raising=False)
    pdl: Any = SimpleNamespace(launch=lambda tensor: {"PDL": False})
    monkeypatch.setitem(sys.modules, "baleen.kernels.pdl", pdl)
    monkeypatch.setattr(kernels, "pdl", pdl, raising=False)
    monkeypatch.setattr(sparse_mla, "hopper", None, raising=False)  # so that undoing forgets what is imported here
    monkeypatch.delitem(sys.modules, f"{folder}.hopper", raising=False)
    module = importlib.import_module(f"{folder}.hopper")
    monkeypatch.setattr(module, "_is_hopper", lambda device: True)
    yield module
    sys.modules.pop(f"{folder}.hopper")


@pytest.mark.parametrize("case", [case for case in CASES if "512-64" in str(case)], ids=str)
def test_against_the_reference(hopper: Any, case: Case) -> None:
    arguments = case.arguments()
    got = getattr(hopper, case.function)(*arguments)
    want = getattr(reference, case.function)(*arguments)
    assert_close(got, want, case.rtol, case.atol)
    fits = arguments[0].dtype == torch.bfloat16 and arguments[1].stride(0) % 8 == 0
    assert bool(hopper.triton_kernel.calls) == (not fits)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("padding", ["none", "anywhere", "end", "all"])
@pytest.mark.parametrize(("heads", "selected", "parts"), [(64, 320, 1), (3, 320, 2), (130, 130, 3)])
def test_any_number_of_tiles_and_parts(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, fp8: bool, padding: str, heads: int, selected: int, parts: int
) -> None:
    per_part = -(-selected // parts // 64) * 64
    monkeypatch.setattr(hopper, "shares", lambda *sizes: (parts, per_part))
    name, make = ("sparse_mla_fp8", fp8_attention) if fp8 else ("sparse_mla", int32_attention)
    arguments = make(2, heads, selected, 512, 64, padding, torch.bfloat16, torch.Generator().manual_seed(0))
    got, want = getattr(hopper, name)(*arguments), getattr(reference, name)(*arguments)
    assert_close(got, want, 2**-7, 0.1 if fp8 else 1e-2)
    assert hopper.triton_kernel.calls == ["combine"] * (parts > 1)


def test_every_code_of_fp8(hopper: Any) -> None:
    """One row is the result: each of the 254 numbers, subnormals too, with scales from 2^-20 to 2^7."""
    values, scales, rope = latent_views(torch.zeros(65, 656, dtype=torch.uint8), 512, 64)
    codes = torch.arange(512).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    for row in range(1, 65):
        values.view(torch.uint8)[row] = codes.roll(row)
    scales.copy_(torch.exp2((torch.arange(65 * 4) % 28 - 20).float()).view(65, 4))
    q, indices = torch.zeros(64, 1, 576, dtype=torch.bfloat16), torch.arange(1, 65)[:, None]
    got = hopper.sparse_mla_fp8(q, values, scales, rope, indices, 1.0)
    want = values[1:].float() * scales[1:].repeat_interleave(128, 1)
    assert torch.equal(got[:, 0].float(), want)


FENCE = "fence_async_shared()\n    gl.thread_barrier()\n    return now"
BF16, FP8 = "attend", "attend_fp8_tile"


@pytest.mark.parametrize(
    ("kernel", "correct", "wrong"),
    [
        *((kernel, FENCE, "gl.thread_barrier()\n    return now") for kernel in (BF16, FP8)),
        *((kernel, FENCE, "fence_async_shared()\n    return now") for kernel in (BF16, FP8)),
        *((kernel, "wait_group(0)\n    fence_async_shared()", "wait_group(0)") for kernel in (BF16, FP8)),
        (BF16, "deps=(pending,))\n        gl.thread_barrier()", "deps=(pending,))"),
        (BF16, "warpgroup_mma_wait(2", "warpgroup_mma_wait(3"),
        (
            BF16,
            "_scores(q_latent, q_rope, latents.index(1 - buffer)",
            "_scores(q_latent, q_rope, latents.index(buffer)",
        ),
        (BF16, "async_copy.wait_group(0)\n    gl.thread_barrier()\n    total", "total"),
        (FP8, "    _write(words, scale, pairs)\n", ""),
    ],
)
def test_the_emulation_notices(hopper: Any, kernel: str, correct: str, wrong: str) -> None:
    assert correct in SOURCE
    setattr(hopper.gluon_kernel, kernel, getattr(_emulated(SOURCE.replace(correct, wrong)), kernel))
    make, name, rows = {BF16: (int32_attention, "sparse_mla", 320), FP8: (fp8_attention, "sparse_mla_fp8", 60)}[kernel]
    arguments = make(1, 64, rows, 512, 64, "none", torch.bfloat16, torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        assert_close(getattr(hopper, name)(*arguments), getattr(reference, name)(*arguments), 2**-7, 0.1)
