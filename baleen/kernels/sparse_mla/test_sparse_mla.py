"""sparse_mla against loops over tokens and heads in float64, and against dense attention under the selection's mask."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.kernels.dispatch import available, find
from baleen.kernels.sparse_mla import IMPLEMENTATIONS, reference, sparse_mla, sparse_mla_fp8
from baleen.kernels.sparse_mla import shares as shares_module
from baleen.kernels.sparse_mla.cases import CASES, fp8_attention, int32_attention
from baleen.kernels.sparse_mla.shares import has_fast_parts, shares
from baleen.kernels.testing import Case, check, largest_scratch, to_device


def _loops(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> np.ndarray:
    queries, rows = q.double().numpy(), kv.double().numpy()
    out = np.zeros((*q.shape[:2], d_v))
    for token, head in np.ndindex(*q.shape[:2]):
        chosen = [row for row in indices[token].tolist() if row >= 0]
        if chosen:
            scores = scale * rows[chosen] @ queries[token, head]
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ rows[chosen, :d_v]
    return out


def _loops_fp8(q: Tensor, values: Tensor, scales: Tensor, rope: Tensor, indices: Tensor, scale: float) -> np.ndarray:
    latent = values.float() * scales.repeat_interleave(128, 1)[:, : values.shape[1]]
    return _loops(q, torch.cat((latent, rope.float()), 1), indices, scale, values.shape[1])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_loops(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, {"sparse_mla": _loops, "sparse_mla_fp8": _loops_fp8}[case.function])


FP8_CASES = [case for case in CASES if case.function == "sparse_mla_fp8"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", FP8_CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_parts_add_up(implementation: str, case: Case, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    function = find(IMPLEMENTATIONS, implementation, "sparse_mla_fp8_parts")
    if function is None:
        return
    arguments = case.arguments()
    parts = function(*(to_device(arguments, device) if device == "cuda" else arguments))
    maxima, totals = parts.maxima.double(), parts.totals.double()
    factors = np.exp2((maxima - maxima.amax(1, keepdim=True)).cpu().numpy())
    total = (factors * totals.cpu().numpy()).sum(1)
    summed = np.einsum("tph,tphl->thl", factors, parts.sums.double().cpu().numpy())
    expected = _loops_fp8(*arguments)
    tolerance = {"rtol": case.rtol, "atol": case.atol}
    np.testing.assert_allclose(summed / np.where(total > 0, total, 1)[..., None], expected, **tolerance)
    np.testing.assert_allclose(parts.join().cpu().numpy(), expected, **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_loops(implementation: str, case: Case) -> None:
    oracle = {"sparse_mla": _loops, "sparse_mla_fp8": _loops_fp8}[case.function]
    check(IMPLEMENTATIONS, implementation, case, oracle, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 3, 16, 300])
@pytest.mark.parametrize("function", ["sparse_mla", "sparse_mla_fp8"])
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_at_full_size(implementation: str, function: str, tokens: int) -> None:
    """128 heads and 2048 rows of a pool, some missing; few tokens are shared out, many are not. Twice the same."""
    run = find(IMPLEMENTATIONS, implementation, function)
    assert run is not None
    g = torch.Generator().manual_seed(tokens)
    make = fp8_attention if function == "sparse_mla_fp8" else int32_attention
    arguments = make(tokens, 128, 2048, 512, 64, "anywhere" if tokens < 16 else "end", torch.bfloat16, g)
    arguments = (*arguments[:-1], 0.02) if function == "sparse_mla_fp8" else (*arguments[:-2], 0.1, 512)
    moved = to_device(arguments, "cuda")
    got, again = run(*moved), run(*moved)
    want = getattr(reference, function)(moved[0].float(), *moved[1:])
    assert torch.equal(got, again)
    assert float((got.float() - want).norm() / want.norm()) < 6e-3


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("module", "kernel", "row", "products"),
    [
        ("gluon_kernel", "attend", 576, 2 * (36 + 4)),
        ("gluon_kernel", "attend_fp8_tile", 656, 36 + 4),
        ("gluon_fp8", "attend", 656, 4 * 36 + 4 * 4 + 4),  # a pair in the loop, one outside; the right half
    ],
)
def test_compiles_for_hopper(module: str, kernel: str, row: int, products: int, split: bool) -> None:
    """Without a GPU: products on the tensor cores in flight side by side, tiles copied 16 bytes at a time."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    backends = pytest.importorskip("triton.backends.compiler")
    source = pytest.importorskip("triton.experimental.gluon._runtime").GluonASTSource
    kernels = importlib.import_module(f"baleen.kernels.sparse_mla.{module}")

    function = getattr(kernels, kernel)
    names = function.arg_names
    pointers = dict.fromkeys(("q", "kv", "rope", "out"), "*bf16") | {"values": "*i32", "indices": "*i32"}
    pointers |= dict.fromkeys(("scales", "sums", "maxima", "totals"), "*fp32")
    constants: dict[str, Any] = {"ROW": row, "SPLIT": split, "HOLD_ROPE": True, "PDL": True}
    constants |= {} if split else dict.fromkeys(("sums",))
    constants = {name: value for name, value in constants.items() if name in names}
    types = {"scale_log2": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    strides = [name for name in names if name.startswith(("q_", "out_"))]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *strides) if name in names}
    aligned = {key: value for key, value in aligned.items() if signature[names[key[0]]] != "constexpr"}
    compiled = triton.compile(
        source(function, signature, constants, aligned),
        target=backends.GPUTarget("cuda", 90, 32),
        options={"num_warps": kernels.NUM_WARPS},
    )
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    assert ptx.count("wgmma.mma_async") == products
    assert "cp.async.cg.shared.global" in ptx
    assert not re.search(r"cp\.async\.ca|ld\.global\.b16|st\.shared\.b16", ptx)


def test_shares_fill_the_machine() -> None:
    """Heads of a token are 2 programs here, 2048 rows 32 tiles, and 132 programs run at a time."""
    assert [shares(2 * tokens, 2048, 64, 132) for tokens in (1, 16, 64, 4096)] == [
        (32, 64),
        (4, 512),
        (1, 2048),
        (1, 2048),
    ]
    for programs, selected in ((1, 1), (6, 130), (3, 5000), (200, 2000)):
        parts, length = shares(programs, selected, 64, 132)
        assert parts * length >= selected
        assert (parts - 1) * length < selected


def test_equals_sdpa_under_the_mask_of_the_selection() -> None:
    q, kv = torch.randn(7, 4, 48), torch.randn(30, 48)
    indices = torch.stack([torch.randperm(30)[:9] for _ in range(7)])
    mask = torch.zeros(7, 30, dtype=torch.bool).scatter(1, indices, True)
    shared = kv[None].expand(4, -1, -1)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], shared[None], shared[None, ..., :32], attn_mask=mask[None, None], scale=0.2
    )[0].transpose(0, 1)
    torch.testing.assert_close(sparse_mla(q, kv, indices, 0.2, 32), expected, rtol=1e-5, atol=1e-5)


def test_the_order_and_place_of_the_indices_do_not_matter() -> None:
    q, kv = torch.randn(2, 3, 20), torch.randn(10, 20)
    straight = sparse_mla(q, kv, torch.tensor([[1, 4, 7, -1, -1], [0, 2, 3, 5, 9]]), 0.5, 16)
    shuffled = sparse_mla(q, kv, torch.tensor([[-1, 7, -1, 1, 4], [9, 0, 5, 3, 2]]), 0.5, 16)
    torch.testing.assert_close(straight, shuffled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    q, kv = torch.randn(2, 3, 20).to(dtype), torch.randn(10, 20).to(dtype)
    out = sparse_mla(q, kv, torch.tensor([[1, -1], [-1, -1]]), 0.5, 16)
    assert (out.dtype, out.shape) == (dtype, (2, 3, 16))
    assert torch.equal(out[0], kv[1, :16].expand(3, 16))
    assert not bool(out[1].any())


@pytest.mark.parametrize("case", [case for case in CASES if "-9-2-" in str(case) or "fp8" in str(case)], ids=str)
def test_small_chunks_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    function = {"sparse_mla": sparse_mla, "sparse_mla_fp8": sparse_mla_fp8}[case.function]
    whole = function(*case.arguments())
    for tokens in (0, 1, 2, 4):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", tokens * 6 * 138 * 4 + 1)
        got = function(*case.arguments())
        torch.testing.assert_close(
            got.float(), whole.float(), rtol=1e-5 if got.dtype == torch.float32 else 2**-7, atol=1e-5
        )


def test_scratch_stays_small() -> None:
    """The gathered rows of all tokens are 64 MiB."""
    q, kv = torch.randn(64, 2, 128), torch.randn(4096, 128)
    indices = torch.randint(0, 4096, (64, 2048))
    assert largest_scratch(sparse_mla, q, kv, indices, 0.1, 96) <= 8 << 20


def test_parts_are_made_where_the_hopper_kernel_takes_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "_has_hopper_kernels", lambda device: True)
    q, values = torch.empty(1, 8, 576, dtype=torch.bfloat16), torch.empty(9, 512)
    assert has_fast_parts(q, values)
    assert not has_fast_parts(q.float(), values)
    assert not has_fast_parts(q[..., :80], values[:, :64])
    monkeypatch.undo()
    assert not has_fast_parts(q, values), "a CPU's torch"
