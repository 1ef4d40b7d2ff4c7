"""The FlashMLA backends around a stand-in for the package that does on a CPU what it documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from baleen.attention import absorbed
from baleen.attention import backend as backend_module
from baleen.attention.test_backend import CASES, MODEL, Requests, make
from baleen.kernels.fp8_quant import dequantize_1x128
from baleen.kernels.kv_store.cases import latent_views
from baleen.kernels.kv_store.reference import gather_latent_fp8
from baleen.kernels.sparse_mla.reference import sparse_mla


class FakeFlashMla(ModuleType):
    def __init__(self) -> None:
        super().__init__("flash_mla")
        self.calls: list[str] = []

    def get_mla_metadata(self) -> tuple[dict[str, Any], None]:
        return {}, None

    def flash_mla_sparse_fwd(
        self, q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int, **options: Any
    ) -> tuple[Tensor, None, None]:
        assert options == {"use_legacy": True, "return_log2_lse": False}
        assert q.shape[1] in (64, 128)
        assert q.dtype == kv.dtype
        self.calls.append("sparse")
        return self._attend(q, kv[:, 0], indices, sm_scale, d_v), None, None

    def flash_mla_with_kvcache(
        self, q: Tensor, k_cache: Tensor, table: None, lengths: None, d_v: int, schedule: Any, **options: Any
    ) -> tuple[Tensor, None]:
        assert options["use_legacy"]
        assert options["is_fp8_kvcache"]
        assert k_cache.shape[1:3] == (64, 1)
        # the schedule of one call serves any other of the same shapes
        assert schedule.setdefault("shapes", (q.shape, options["indices"].shape)) == (q.shape, options["indices"].shape)
        self.calls.append("kv")
        rows = k_cache.view(torch.uint8).flatten(0, 2)
        kv = gather_latent_fp8(*latent_views(rows, d_v, q.shape[3] - d_v), torch.arange(rows.shape[0]))
        out = self._attend(q[:, 0], kv.to(q.dtype), options["indices"], options["softmax_scale"], d_v)
        return out[:, None], None

    def _attend(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int) -> Tensor:
        assert indices.dtype == torch.int32
        assert indices.shape[1] == 1
        assert indices.shape[2] % 128 == 0
        return sparse_mla(q, kv, indices[:, 0].long(), scale, d_v)


@pytest.fixture
def flash_mla(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashMla]:
    name = "baleen.attention.flashmla"
    real = sys.modules.pop(name, None)
    fake = FakeFlashMla()
    monkeypatch.setitem(sys.modules, "flash_mla", fake)
    import_module(name)
    yield fake
    del sys.modules[name]
    if real is not None:
        sys.modules[name] = real


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kv", "prefill", "decode"),
    [
        ("float32", "flashmla_sparse", "flashmla_sparse"),
        ("fp8_e4m3", "flashmla_sparse", "flashmla_kv"),
        ("fp8_e4m3", "flashmla_kv", "flashmla_kv"),
    ],
)
def test_equals_the_reference(
    flash_mla: FakeFlashMla, monkeypatch: pytest.MonkeyPatch, case: str, kv: str, prefill: str, decode: str
) -> None:
    """Rows, indices and padded heads reach the kernels as these document them, whatever the batch."""
    requests = Requests(*CASES[case])
    expected, _ = requests.run(make(requests, threshold=0, kv=kv))
    backend = make(requests, threshold=0, kv=kv)
    backend._prefill = backend_module._load(prefill)(backend.pool, MODEL.softmax_scale, 0)
    backend._decode = backend_module._load(decode)(backend.pool, MODEL.softmax_scale, 0)
    out, _ = requests.run(backend)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    kinds = {name: name.removeprefix("flashmla_") for name in (prefill, decode)}
    wanted = {kinds[decode if q == 1 else prefill] for q in requests.q_lens}
    assert set(flash_mla.calls) == wanted


@pytest.mark.parametrize("decode", ["flashmla_kv", "triton"])
@pytest.mark.parametrize("length", [5, 200])
def test_one_token_is_attended_in_parts(
    flash_mla: FakeFlashMla, monkeypatch: pytest.MonkeyPatch, decode: str, length: int
) -> None:
    """Where our own kernel makes them, by its reference here; two tokens are not."""
    monkeypatch.setattr(absorbed, "has_fast_parts", lambda q, values: True)
    made, parts_of = [], absorbed.sparse_mla_fp8_parts
    monkeypatch.setattr(
        absorbed, "sparse_mla_fp8_parts", lambda q, *others: made.append(len(q)) or parts_of(q, *others)
    )
    for lengths in ([length], [length, 33]):
        requests = Requests(lengths, [1] * len(lengths))
        expected, _ = requests.run(make(requests, threshold=0, kv="fp8_e4m3"))
        backend = make(requests, threshold=0, kv="fp8_e4m3")
        backend._decode = backend_module._load(decode)(backend.pool, MODEL.softmax_scale, 0)
        selected = requests.select(backend)
        torch.testing.assert_close(backend.attend(*selected), expected, rtol=1e-4, atol=1e-5)
        rows = dequantize_1x128(*backend.attend_quantized(*selected))
        torch.testing.assert_close(rows, expected.flatten(1), rtol=0.07, atol=0.01)
    assert made == [1, 1]
