"""Programmatic dependent launch, in PTX: every kernel that has it, compiled for Hopper without a GPU."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baleen.kernels.dispatch import find

KERNELS = Path(__file__).parent
FILES = [path for path in KERNELS.glob("*/*.py") if "pdl.launch(" in path.read_text()]
OPS = sorted({path.parent.name for path in FILES})
WEIGHTS = {"weight", "bias", "latent_weight", "key_weight", "key_bias"}  # parameters that no kernel writes
ELSEWHERE = {"param", "shared", "local", "const"}  # memory that no other kernel has
_INSTRUCTION = re.compile(r"(?:@(!?%\w+) +)?([a-z_]\w*(?:[.:]+\w+)*)\s*([^;]*);")
_TENSOR_LOAD = re.compile(r"cp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global")
_TABLE = re.compile(r"([\w$]+):\s*\.branchtargets\s*([^;]*);")


def _program(ptx: str) -> tuple[list[tuple[str, str, str]], dict[str, int], dict[str, list[str]]]:
    """(predicate, operation, operands) of each instruction, where labels point, and the labels in each table."""
    body = re.sub(r"//.*", "", ptx[ptx.index("\n{") + 2 :])
    targets = {table: re.findall(r"[\w$]+", labels) for table, labels in _TABLE.findall(body)}
    body = _TABLE.sub("", body)
    instructions: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"\s*([\w$]+):", line):
            labels[label[1]] = len(instructions)
        elif not line.strip().startswith("."):
            instructions += [(found[1] or "", found[2], found[3]) for found in _INSTRUCTION.finditer(line)]
    return instructions, labels, targets


def _by_task(instructions: list[tuple[str, str, str]]) -> set[str]:
    """Predicates that compare the byte by which specialised warps are told their task."""
    tasks = {operands.split(",")[0] for _, operation, operands in instructions if operation == "ld.shared.b8"}
    compared = [operands.split(", ") for _, operation, operands in instructions if operation == "setp.eq.b16"]
    return {predicate for predicate, byte, _ in compared if byte in tasks}


def _before_the_wait(
    instructions: list[tuple[str, str, str]], labels: dict[str, int], targets: dict[str, list[str]], never: set[str]
) -> Iterator[int]:
    """Of the instructions, which can be reached without waiting. targets: of each branch by a table; never: predicates
    of branches that are not taken.
    """
    places, seen = [0], set()
    while places:
        place = places.pop()
        if place in seen or instructions[place][1] == "griddepcontrol.wait":
            continue
        seen.add(place)
        predicate, operation, operands = instructions[place]
        yield place
        jumps = operation.startswith(("bra", "brx"))
        if operation.startswith("brx"):
            places += [labels[label] for label in targets.get(operands.split(",")[1].strip(), ())]
        elif jumps and predicate not in never:
            places.append(labels[operands.strip()])
        if predicate or not (jumps or operation in ("ret", "exit")):
            places.append(place + 1)


def _parameters(instructions: list[tuple[str, str, str]], address: str) -> set[int]:
    """Numbers of the kernel's parameters that an address is computed from, also by way of what is loaded."""
    sources: dict[str, set[str]] = {}
    for _, _, operands in instructions:
        targets, _, rest = operands.partition("}" if operands.startswith("{") else ",")
        for target in re.findall(r"%\w+", targets):
            sources.setdefault(target, set()).update(re.findall(r"%\w+|_param_\d+", rest))
    reached, names = set(), re.findall(r"%\w+|_param_\d+", address)
    while names:
        name = names.pop()
        if name not in reached:
            reached.add(name)
            names += sources.get(name, ())
    return {int(name.removeprefix("_param_")) for name in reached if name.startswith("_param_")}


def _is_shared_with_others(qualifiers: list[str]) -> bool:
    """True for an access to global memory, or to memory of no stated kind; a prefetch is none."""
    return "prefetch" not in qualifiers and ("global" in qualifiers or not ELSEWHERE & set(qualifiers))


def _names(signature: dict[str, str]) -> list[str]:
    """Of the parameters in PTX: a descriptor of n dims is itself, n sizes and n strides."""
    names = []
    for name, type in signature.items():
        block = re.match(r"tensordesc<\w+\[([^]]*)]", type)
        names += [name] * (1 + 2 * len(block[1].split(",")) if block else type != "constexpr")
    return names


def _global_address(operation: str, operands: str) -> str:
    """That of a copy of a tensor into shared memory is its descriptor, which comes second; else all addresses."""
    if _TENSOR_LOAD.match(operation):
        return re.findall(r"\[([^]]*)]", operands)[1].split("{")[0]
    return operands[operands.index("[") :]


def violations(ptx: str, names: list[str]) -> list[str]:
    """What a kernel does before it waits and must not. names: of its parameters."""
    instructions, labels, targets = _program(ptx)
    kinds = r"\.ptr\b.*_param_(\d+)|\.b8 \w+_param_(\d+)\[128\]"
    pointers = {int(number or descriptor) for number, descriptor in re.findall(kinds, ptx)}
    # A kernel of specialised warps branches to the task of each, by a table or, if they are few, comparing. Those that
    # have none reach `ret` by it, and may: the block ends with its other warps, which wait. On another path it ends.
    without_tasks = set(_before_the_wait(instructions, labels, {}, _by_task(instructions)))
    found = []
    for place in _before_the_wait(instructions, labels, targets, set()):
        _, operation, operands = instructions[place]
        kind, *where = re.split(r"[.:]+", operation)
        if kind in ("ret", "exit"):
            found += [operation] * (place in without_tasks)
        elif kind in ("ld", "st", "atom", "red", "cp") and "[" in operands and _is_shared_with_others(where):
            address = _global_address(operation, operands)
            used = {names[number] for number in _parameters(instructions, address) & pointers}
            if not (kind == "ld" or _TENSOR_LOAD.match(operation)) or not used or used - WEIGHTS:
                found.append(f"{operation} by {sorted(used)}")
    return found


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Name -> compiled variants of what is launched meanwhile with PDL. Nothing runs, and outputs stay as they are."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("compiles, which Triton's interpreter does not")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from baleen.kernels import pdl

    for path in FILES:
        import_module(f"baleen.kernels.{path.parent.name}.{path.stem}")
    kernels: dict[str, list[Any]] = {}
    seen = set()
    compile_for_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        flags = (options[name] for name in sorted(options) if isinstance(options[name], bool))
        variant = (self, *(argument is None for argument in args), *flags)
        if "PDL" in self.arg_names and variant not in seen:
            seen.add(variant)
            kernel = compile_for_launch(self, *args, grid=grid, warmup=True, **options)
            kernels.setdefault(self.__name__, []).append(kernel)

    hopper = SimpleNamespace(
        get_current_device=lambda: "none",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", hopper)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # what lets tensors of a CPU reach the launch
    monkeypatch.setattr(pdl, "launch", lambda tensor, early=True: {"PDL": True, "launch_pdl": early})
    return kernels


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_touches_what_others_do_before_it_waits(
    op: str, compiled: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = import_module(f"baleen.kernels.{op}")
    for case in import_module(f"baleen.kernels.{op}.cases").CASES:
        function = find(package.IMPLEMENTATIONS, "triton", case.function)
        if function is not None:
            function(*case.arguments())
        if op == "fp8_experts":
            _masked_and_joined(monkeypatch, *case.arguments())
        if case.function == "sparse_mla_fp8":
            _parts_of_attention(monkeypatch, *case.arguments())
        if case.function == "part_values_quant":
            _part_values(monkeypatch, *case.arguments())
    for name, kernels in compiled.items():
        for kernel in kernels:
            ptx = kernel.asm["ptx"]
            assert "griddepcontrol.wait" in ptx, name
            assert "griddepcontrol.launch_dependents" in ptx, name
            assert not violations(ptx, _names(kernel.src.signature)), name
    assert launched_with_pdl(op) <= set(compiled), f"no case of {op} launches the others"


def _masked_and_joined(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """What fp8_experts launches for more rows of an expert: layouts, and the product of one."""
    from baleen.kernels.fp8_experts import gluon_kernel, layout

    x, expert_ids, _, weight, weight_scale, *_, dtype = arguments
    monkeypatch.setattr(gluon_kernel, "_num_sms", lambda device: 132)
    num_experts, num_rows, _ = weight.shape
    layout.joined(x, expert_ids, num_experts, 128)
    place = layout.masked(x, expert_ids, num_experts)
    out = torch.empty(place.values.shape[0], num_rows, dtype=dtype)
    gluon_kernel.multiply(place.values, place.scale, place.ends, weight, weight_scale, out)


def _part_values(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """What head_values launches on Hopper."""
    from baleen.kernels.head_values import gluon_kernel

    monkeypatch.setattr(gluon_kernel, "can_run", lambda sums: True)
    gluon_kernel.part_values_quant(*arguments)


def _parts_of_attention(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """What sparse_mla launches on Hopper for few tokens."""
    from baleen.kernels.sparse_mla import hopper

    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    hopper.sparse_mla_fp8_parts(*arguments)


def launched_with_pdl(op: str) -> set[str]:
    """Names of the kernels of an op's folder that have the parameter PDL."""
    found = set()
    for path in (KERNELS / op).glob("*.py"):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and f"{node.name}[" in text:
                found |= {node.name for argument in node.args.args if argument.arg == "PDL"}
    return found


def test_kernels_are_found() -> None:
    assert {"rms_norm", "mla_inputs", "fp8_gemm"} <= set(OPS)
    assert launched_with_pdl("greedy") == {"_chunk_maxima", "_combine"}
    assert launched_with_pdl("mla_inputs") == {"_store_keys", "_index_queries", "_rope_queries"}


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2
)
{
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b64 %rd2, [kernel_param_1];
	ld.param.b32 %r1, [kernel_param_2];
	mad.wide.u32 %rd3, %r1, 4, %rd1;
	mad.wide.u32 %rd4, %r1, 4, %rd2;
	ON_BOTH
	@%p1 bra $L__BB0_2;
	griddepcontrol.wait;
	bra.uni $L__BB0_3;
$L__BB0_2:
	ON_ONE_PATH
	griddepcontrol.wait;
$L__BB0_3:
	@%p1 st.global.v2.b32 [ %rd4 + 0 ], { %r2, %r3 };
	ret;
}
"""


@pytest.mark.parametrize(
    ("on_both", "on_one_path", "found"),
    [
        ("", "", []),
        ("@%p1 ld.global.v2.b32 { %r2, %r3 }, [ %rd3 + 16 ];", "ld.global.b32 %r2, [%rd3];", []),
        ("st.shared.b32 [ %r1 + 0 ], %r2;", "", []),
        ("", "@%p1 ld.global.b32 %r2, [ %rd4 + 0 ];", ["ld.global.b32 by ['x']"]),
        ("ld.global.b64 %rd5, [%rd4]; add.s64 %rd6, %rd5, %rd1;", "", ["ld.global.b64 by ['x']"]),
        ("", "@%p1 st.global.b32 [ %rd3 + 0 ], { %r2 };", ["st.global.b32 by ['weight']"]),
        ("cp.async.bulk.prefetch.L2.global [%rd4], %r2; cp.async.commit_group;", "prefetch.global.L2 [%rd4];", []),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 0x10;", "", ["cp.async.cg.shared.global by ['x']"]),
        ("atom.global.add.u32 %r2, [%rd4], 1;", "", ["atom.global.add.u32 by ['x']"]),
        ("@%p2 ret;", "", ["ret"]),
        ("@%p2 bra $L__BB0_3;", "", ["st.global.v2.b32 by ['x']", "ret"]),
    ],
)
def test_what_comes_too_early_is_found(on_both: str, on_one_path: str, found: list[str]) -> None:
    ptx = PTX.replace("ON_BOTH", on_both).replace("ON_ONE_PATH", on_one_path)
    assert violations(ptx, ["weight", "x", "n"]) == found


SPECIALISED = """
.visible .entry kernel(
	.param .align 64 .b8 kernel_param_0[128],
	.param .u32 kernel_param_1,
	.param .u32 kernel_param_2,
	.param .u64 kernel_param_3,
	.param .u64 kernel_param_4,
	.param .align 64 .b8 kernel_param_5[128],
	.param .u32 kernel_param_6,
	.param .u32 kernel_param_7,
	.param .u64 kernel_param_8,
	.param .u64 kernel_param_9,
	.param .u64 .ptr .global .align 1 kernel_param_10
)
{
	mov.b64 %rd1, kernel_param_0;
	mov.b64 %rd2, kernel_param_5;
	cvta.param.u64 %rd3, %rd1;
	cvta.param.u64 %rd4, %rd2;
	ld.param.b64 %rd5, [kernel_param_10];
	ld.param.b32 %r1, [kernel_param_6];
	@%p1 bra $L__BB0_4;
$L__BB0_1:
	ld.shared.b8 %r2, [%r3];
	$L_brx_0: .branchtargets
		$L__BB0_2,
		$L__BB0_3,
		$L__BB0_5;
	brx.idx %r2, $L_brx_0;
$L__BB0_2:
	IN_FIRST
	griddepcontrol.wait;
	LOAD [%r4], [%rd4, {%r5, %r6}], [%r7];
	bra.uni $L__BB0_1;
$L__BB0_3:
	IN_SECOND
	griddepcontrol.wait;
	bra.uni $L__BB0_1;
$L__BB0_4:
	IN_DEFAULT
	griddepcontrol.wait;
	st.global.b32 [%rd5], %r8;
$L__BB0_5:
	ret;
}
"""
LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"


@pytest.mark.parametrize("by_table", [True, False])
@pytest.mark.parametrize("partition", ["IN_FIRST", "IN_SECOND", "IN_DEFAULT"])
@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("", []),
        (f"@%p2 {LOAD} [%r4], [%rd3, {{%r1, %r5}}], [%r7];", []),
        (f"@%p2 {LOAD} [%r4], [%rd4, {{%r1, %r5}}], [%r7];", [f"{LOAD} by ['x']"]),
        (f"{STORE} [%rd3, {{%r1, %r5}}], [%r4];", [f"{STORE} by ['weight', 'x']"]),
        ("ld.global.b32 %r5, [%rd5];", ["ld.global.b32 by ['out']"]),
        ("@%p2 st.global.b32 [%rd5], %r5;", ["st.global.b32 by ['out']"]),
    ],
)
def test_specialised_warps_are_followed(partition: str, instruction: str, found: list[str], by_table: bool) -> None:
    names = _names({"weight": "tensordesc<fp8e4nv[64, 128],Layout(rank=2)>", "N": "constexpr"})
    names += _names({"x": "tensordesc<fp8e4nv[16, 128]>", "out": "*bf16"})
    assert violations(_specialised(by_table, **{partition: instruction}), names) == found


@pytest.mark.parametrize("by_table", [True, False])
def test_only_warps_without_a_part_return_without_waiting(by_table: bool) -> None:
    names = [*["weight"] * 5, *["x"] * 5, "out"]
    assert violations(_specialised(by_table, IN_FIRST="bra.uni $L__BB0_5;"), names) == []
    assert violations(_specialised(by_table, IN_DEFAULT="@%p2 ret;"), names) == ["ret"]
    assert violations(_specialised(by_table, IN_DEFAULT="@%p2 bra $L__BB0_5;"), names) == ["ret"]


def _specialised(by_table: bool, **parts: str) -> str:
    ptx = SPECIALISED.replace("\tLOAD", f"\t{LOAD}")
    if not by_table:
        start, end = ptx.index("\t$L_brx_0:"), ptx.index("$L__BB0_2:\n")
        compared = (f"\tsetp.eq.b16 %p{9 + i}, %r2, {i};\n\t@%p{9 + i} bra $L__BB0_{(2, 3, 5)[i]};\n" for i in range(3))
        ptx = ptx[:start] + "".join(compared) + "\tbra.uni $L__BB0_1;\n" + ptx[end:]
    for part in ("IN_FIRST", "IN_SECOND", "IN_DEFAULT"):
        ptx = ptx.replace(part, parts.get(part, ""))
    return ptx


def test_a_launch_is_early_where_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="needs the package triton")
    from baleen.kernels import pdl

    capabilities = {"ampere": (8, 6), "hopper": (9, 0), "blackwell": (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", None)
    pdl._is_possible.cache_clear()
    on: Any = {name: SimpleNamespace(is_cuda=True, get_device=lambda name=name: name) for name in capabilities}
    assert pdl.launch(on["hopper"]) == pdl.launch(on["blackwell"]) == {"PDL": True, "launch_pdl": True}
    assert pdl.launch(on["hopper"], early=False) == {"PDL": True, "launch_pdl": False}
    assert pdl.launch(on["ampere"]) == pdl.launch(torch.ones(1)) == {"PDL": False}
    monkeypatch.setattr(pdl, "ENABLED", False)
    assert pdl.launch(on["hopper"]) == {"PDL": False}
    monkeypatch.setattr(pdl, "ENABLED", True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    pdl._is_possible.cache_clear()
    assert pdl.launch(on["hopper"]) == {"PDL": False}, "AMD counts otherwise"
    pdl._is_possible.cache_clear()


@pytest.mark.gpu
def test_a_captured_chain_gives_what_kernels_one_by_one_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel reads what the one before wrote, in memory that others used just before."""
    pytest.importorskip("triton", reason="needs the package triton")
    from baleen.kernels import pdl
    from baleen.kernels.fp8_gemm.triton_kernel import Config, fp8_gemm
    from baleen.kernels.grouped_gemm.triton_kernel import silu_and_mul
    from baleen.kernels.rms_norm.triton_kernel import add_rms_norm_quant

    generator = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(3, 2048, generator=generator, device="cuda").bfloat16()
    gain = torch.rand(2048, generator=generator, device="cuda") + 0.5
    weight = torch.randn(4096, 2048, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.full((32, 16), 2.0**-5, device="cuda")

    def chain() -> torch.Tensor:
        x = residual = start
        for _ in range(40):
            _, quantized, residual = add_rms_norm_quant(x, residual, gain, 1e-6)
            x = silu_and_mul(fp8_gemm(quantized, weight, scale, torch.bfloat16, Config(16, 64, 4, pdl=True)))
        return x

    monkeypatch.setattr(pdl, "ENABLED", False)
    expected = chain()
    assert expected.isfinite().all()
    assert expected.any()
    monkeypatch.setattr(pdl, "ENABLED", True)
    assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(50):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)
