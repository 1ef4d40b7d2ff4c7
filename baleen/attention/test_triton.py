"""The backend over our own kernels' op, on a CPU where the op's reference stands for them."""

from __future__ import annotations

import pytest
import torch

from baleen.attention.test_backend import CASES, MODEL, Requests, make
from baleen.attention.triton import TritonAttention


@pytest.mark.parametrize("kv", ["float32", "fp8_e4m3"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, kv: str) -> None:
    """Slots as int32 reach the right rows in prefill and decode, of any mix of requests."""
    requests = Requests(*CASES[case])
    expected, _ = requests.run(make(requests, threshold=0, kv=kv))
    backend = make(requests, threshold=0, kv=kv)
    backend._prefill = backend._decode = TritonAttention(backend.pool, MODEL.softmax_scale, 0)
    out, selection = requests.run(backend)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert all(chosen is None or chosen.dtype == torch.int32 for chosen in selection)
