"""Cache writes and reads against loops over slots, and against bytes packed by hand: the layouts to the byte."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.kv_store import (
    IMPLEMENTATIONS,
    gather_index_fp8,
    gather_latent_fp8,
    store_index_fp8,
    store_latent_fp8,
)
from baleen.kernels.kv_store.cases import CASES, index_views, latent_views
from baleen.kernels.testing import Case, check, run_in_interpreter


def _scale(values: Tensor) -> float:
    return float(2.0 ** np.ceil(np.log2(max(values.double().abs().max().item(), 1e-4) / 448)))


def _store_rows(dst: Tensor, slots: Tensor, src: Tensor) -> None:
    for slot, row in zip(slots.tolist(), src, strict=True):
        dst[slot].copy_(row)


def _store_latent(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor, latent: Tensor, k_pe: Tensor) -> None:
    for slot, row, pe in zip(slots.tolist(), latent, k_pe, strict=True):
        for block in range(scales.shape[1]):
            part = slice(block * 128, (block + 1) * 128)
            scales[slot, block] = _scale(row[part])
            values[slot, part].copy_((row[part].double() / _scale(row[part])).to(torch.float8_e4m3fn))
        rope[slot].copy_(pe)


def _gather_latent(values: Tensor, scales: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
    out = torch.zeros(len(slots), values.shape[1] + rope.shape[1])
    for i, slot in enumerate(slots.tolist()):
        for j in range(values.shape[1]):
            out[i, j] = values[slot, j].float() * scales[slot, j // 128]
        out[i, values.shape[1] :] = rope[slot]
    return out


def _store_index(keys: Tensor, scales: Tensor, slots: Tensor, k: Tensor) -> None:
    for slot, row in zip(slots.tolist(), k, strict=True):
        scales[slot // 64, slot % 64] = _scale(row)
        keys[slot // 64, slot % 64].copy_((row.double() / _scale(row)).to(torch.float8_e4m3fn))


def _gather_index(keys: Tensor, scales: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
    requests = [[keys[page] for page in row] for row in page_table.tolist()]
    by_request = [torch.cat([page.float() for page in pages]) for pages in requests]
    return torch.stack(by_request), torch.stack(
        [torch.cat([scales[page] for page in row]) for row in page_table.tolist()]
    )


ORACLES = {
    "store_rows": _store_rows,
    "store_latent_fp8": _store_latent,
    "gather_latent_fp8": _gather_latent,
    "gather_latent_bf16": lambda *arguments: _gather_latent(*arguments).bfloat16(),
    "store_index_fp8": _store_index,
    "gather_index_fp8": _gather_index,
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_against_loops(implementation: str, case: Case) -> None:
    check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
def test_on_a_gpu_against_loops(implementation: str) -> None:
    for case in CASES:
        check(IMPLEMENTATIONS, implementation, case, ORACLES[case.function], "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
def test_triton_kernels_in_its_interpreter() -> None:
    """Copies of pages once more, where Triton interprets its kernels: that is chosen at import. It widens FP8 otherwise
    than a GPU."""
    run_in_interpreter(__file__, "triton and gather_index")


def test_the_656_byte_row() -> None:
    """512 e4m3, four little-endian float32 scales, 64 bfloat16, in this order, and no other byte is touched."""
    latent = torch.zeros(1, 512)
    # Block maxima 448 * 2^b: scales 2^b. 1.0, -2.0 in e4m3 are 0x38, 0xc0; 448 is 0x7e.
    for block in range(4):
        latent[0, 128 * block : 128 * block + 3] = torch.tensor([448.0, 1.0, -2.0]) * 2.0**block
    k_pe = torch.arange(64, dtype=torch.float32)[None]
    rows = torch.full((130, 656), 0xAB, dtype=torch.uint8)
    views = latent_views(rows, 512, 64)
    store_latent_fp8(*views, torch.tensor([129]), latent, k_pe)

    expected = b"".join(bytes([0x7E, 0x38, 0xC0]) + bytes(125) for _ in range(4))
    expected += struct.pack("<4f", 1.0, 2.0, 4.0, 8.0)
    # A bfloat16 is the upper half of a float32.
    expected += b"".join(struct.pack("<f", float(i))[2:] for i in range(64))
    assert len(expected) == 656
    assert rows[129].numpy().tobytes() == expected
    assert bool((rows[:129] == 0xAB).all())
    assert torch.equal(gather_latent_fp8(*views, torch.tensor([129])), torch.cat((latent, k_pe), 1))


def test_the_8448_byte_page() -> None:
    """64 keys of 128 e4m3, then 64 float32 scales."""
    k = torch.zeros(2, 128)
    k[0, :2] = torch.tensor([448.0, 1.0])
    k[1, :2] = torch.tensor([-448.0, 2.0]) * 2.0**-3
    pages = torch.full((3, 8448), 0xAB, dtype=torch.uint8)
    views = index_views(pages, 128)
    store_index_fp8(*views, torch.tensor([64 + 5, 128 + 63]), k)

    expected = bytearray(b"\xab" * (3 * 8448))
    expected[8448 + 5 * 128 : 8448 + 6 * 128] = bytes([0x7E, 0x38]) + bytes(126)
    expected[8448 + 8192 + 5 * 4 : 8448 + 8192 + 6 * 4] = struct.pack("<f", 1.0)
    expected[2 * 8448 + 63 * 128 : 2 * 8448 + 64 * 128] = bytes([0xFE, 0x40]) + bytes(126)
    expected[2 * 8448 + 8192 + 63 * 4 : 2 * 8448 + 8448] = struct.pack("<f", 2.0**-3)
    assert pages.numpy().tobytes() == bytes(expected)

    keys, scales = gather_index_fp8(*views, torch.tensor([[2, 1]]))
    assert (keys.shape, keys.dtype) == ((1, 128, 128), torch.float8_e4m3fn)
    assert torch.equal(keys[0, 63].float() * scales[0, 63], k[1])
    assert torch.equal(keys[0, 64 + 5].float() * scales[0, 64 + 5], k[0])


def test_index_keys_wider_than_a_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="256 wide"):
        store_index_fp8(
            *index_views(torch.zeros(1, 64 * 260, dtype=torch.uint8), 256), torch.tensor([0]), torch.zeros(1, 256)
        )
