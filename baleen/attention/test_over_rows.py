"""What the backends of libraries share. Each is tested around a stand-in, which does on a CPU what is documented."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import ATTENTION
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool
from baleen.attention.over_rows import OverRows
from baleen.attention.test_backend import CASES, LATENT, MODEL, TOPK, Requests, make
from baleen.kernels.sparse_mla.reference import sparse_mla

SMALL = ["decode, all longer", "decode, all shorter than top-k", "decode and chunks"]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, functions: dict[str, dict[str, Any]]) -> None:
    """Import a backend's module anew, with modules of these attributes in place of its library's."""
    for module, attributes in functions.items():
        fake = ModuleType(module)
        vars(fake).update(attributes)
        monkeypatch.setitem(sys.modules, module, fake)
    path = ATTENTION[name].split(":")[0]
    monkeypatch.setitem(sys.modules, path, ModuleType(path))  # taken out again at the end of the test
    del sys.modules[path]
    import_module(path)


def check(kind: type, case: str, kv: str) -> None:
    """A backend gives what the reference gives, over a cache with NaN where nobody wrote. Over fp8 it does prefill."""
    requests = Requests(*CASES[case])
    expected, _ = requests.run(make(requests, threshold=0, kv=kv))
    backend = make(requests, threshold=0, kv=kv)
    rows = backend.pool.latent[0]
    if isinstance(rows, Tensor):
        rows.fill_(torch.nan)
        backend._decode = kind(backend.pool, MODEL.softmax_scale, 0)
    backend._prefill = kind(backend.pool, MODEL.softmax_scale, 0)
    out, _ = requests.run(backend)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


class Plain(OverRows):
    multiple = 24
    calls = 0

    def over(self, query: Tensor, rows: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        assert (indices.dtype, counts.dtype) == (torch.int32, torch.int32)
        assert indices.shape[1] % 24 == 0
        assert torch.equal((indices >= 0).cumprod(1).sum(1), counts.long())
        assert torch.equal((indices >= 0).sum(1), counts.long())
        Plain.calls += 1
        return sparse_mla(query, rows, indices.long(), self.softmax_scale, LATENT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv", ["float32", "fp8_e4m3"])
def test_rows_indices_and_counts_fit_together(case: str, kv: str) -> None:
    Plain.calls = 0
    check(Plain, case, kv)
    assert Plain.calls or (kv == "fp8_e4m3" and "decode," in case)


def test_decode_over_fp8_is_refused() -> None:
    requests = Requests([70, 80], [1, 1])
    backend = make(requests, threshold=0, kv="fp8_e4m3")
    backend._decode = Plain(backend.pool, MODEL.softmax_scale, 0)
    with pytest.raises(AssertionError, match="reads a bfloat16 cache"):
        requests.run(backend)


def test_counts_are_worked_out_once_a_step() -> None:
    pool = KVPool(MODEL, 2, "float32", "float32", torch.device("cpu"))
    plain = Plain(pool, MODEL.softmax_scale, 0)
    lengths = torch.tensor([5, 70])
    group = Group(slice(0, 2), torch.tensor([[1, 0], [1, 2]]), lengths, 70, 1, True)
    counts = plain._counts(group.lengths, TOPK)
    assert counts.tolist() == [5, TOPK]
    assert plain._counts(group.lengths, TOPK) is counts
    assert plain._counts(group.lengths, 70).tolist() == [5, 70]
    assert plain._counts(lengths.clone(), 70).tolist() == [5, 70]
