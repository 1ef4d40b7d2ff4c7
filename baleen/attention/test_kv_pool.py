"""The cache to the byte: what `store` writes, read back with `struct` from the raw buffer."""

from __future__ import annotations

import dataclasses
import math
import struct

import pytest
import torch

from baleen.attention.kv_pool import KVPool, PackedIndex, PackedLatent
from baleen.attention.test_models import index_keys, latents, no_norms, no_rope, small_model

MODEL = dataclasses.replace(
    small_model(), num_hidden_layers=1, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128
)


def e4m3(byte: int) -> float:
    """One e4m3fn code by its definition: sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def raw_bytes(view: torch.Tensor) -> bytes:
    return bytes(view.untyped_storage().tolist())


def test_latent_row_of_656_bytes() -> None:
    pool = KVPool(MODEL, 2, "fp8_e4m3", "float32", torch.device("cpu"))
    rows = pool.latent[0]
    assert isinstance(rows, PackedLatent)
    torch.manual_seed(0)
    rows_in = latents(3, 512)
    latent = rows_in * torch.tensor([1.0, 100.0, 1e-6, 0.02]).repeat_interleave(128)
    k_pe = torch.randn(3, 64)
    slots = torch.tensor([64, 130, 191])
    rows.values.untyped_storage().fill_(0xAB)
    norms = no_norms(512, 128)
    norms.latent_weight.copy_(latent[0] / rows_in[0])
    pool.store(0, slots, rows_in, k_pe, index_keys(3, 128), norms, *no_rope(3, 64))
    data = raw_bytes(rows.values)
    assert len(data) == 3 * 64 * 656
    for token, slot in enumerate(slots.tolist()):
        row = data[slot * 656 : (slot + 1) * 656]
        scales = struct.unpack("<4f", row[512:528])
        for j, scale in enumerate(scales):
            assert math.frexp(scale)[0] == 0.5, "not a power of two"
            block = latent[token, 128 * j : 128 * (j + 1)]
            assert scale >= max(float(block.abs().max()), 1e-4) / 448
            assert scale < max(float(block.abs().max()), 1e-4) / 448 * 2
            got = torch.tensor([e4m3(b) * scale for b in row[128 * j : 128 * (j + 1)]])
            # half a step of 3 mantissa bits, or half a subnormal step
            assert ((got - block).abs() <= (block.abs() * 2**-4).clamp_min(scale * 2**-10)).all()
        rope = torch.tensor(struct.unpack("<64H", row[528:]), dtype=torch.int32)
        expected = k_pe[token].to(torch.bfloat16).view(torch.uint16).to(torch.int32)
        assert torch.equal(rope, expected)
    for slot in set(range(192)) - set(slots.tolist()):
        assert data[slot * 656 : (slot + 1) * 656] == b"\xab" * 656, f"slot {slot} was written"
    torch.testing.assert_close(
        pool.read_latent(0, slots, torch.float32)[:, :512], latent, rtol=2**-4, atol=float(1e-4 / 448 * 2 * 2**-10)
    )


def _store_keys(pool: KVPool, slots: torch.Tensor, keys: torch.Tensor) -> None:
    tokens = len(slots)
    rest = latents(tokens, 512), torch.zeros(tokens, 64)
    pool.store(0, slots, *rest, keys, no_norms(512, 128), *no_rope(tokens, 64))


def test_index_page_of_8448_bytes() -> None:
    pool = KVPool(MODEL, 2, "float32", "fp8_e4m3", torch.device("cpu"))
    pages = pool.index[0]
    assert isinstance(pages, PackedIndex)
    torch.manual_seed(0)
    keys = index_keys(2, 128)
    _store_keys(pool, torch.tensor([64 + 5, 128 + 63]), keys)
    data = raw_bytes(pages.keys)
    assert len(data) == 3 * 8448
    # an orthonormal transform keeps the dot product of two keys
    stored = []
    for page, offset in ((1, 5), (2, 63)):
        at = page * 8448
        (scale,) = struct.unpack("<f", data[at + 8192 + 4 * offset : at + 8192 + 4 * offset + 4])
        stored.append(torch.tensor([e4m3(b) * scale for b in data[at + 128 * offset : at + 128 * (offset + 1)]]))
    for i in range(2):
        for j in range(2):
            error = abs(float(stored[i] @ stored[j] - keys[i] @ keys[j]))
            assert error < 2 * 2**-4 * float(keys[i].norm() * keys[j].norm())
    assert not torch.allclose(stored[0], keys[0], atol=0.1), "stored without the Hadamard transform"
    read, scales = pool.read_index(0, torch.tensor([[1, 2]]))
    assert scales is not None
    torch.testing.assert_close((read.float() * scales[..., None])[0, 5], stored[0])
    torch.testing.assert_close((read.float() * scales[..., None])[0, 127], stored[1])


@pytest.mark.parametrize("pages", [[1, 2], [2, 1]])
def test_float_index_reads_what_was_stored(pages: list[int]) -> None:
    """Consecutive pages come back as a view, others as a copy: the same content."""
    pool = KVPool(MODEL, 2, "float32", "float32", torch.device("cpu"))
    keys = index_keys(128, 128)
    positions = torch.arange(128)
    slots = torch.tensor(pages)[positions // 64] * 64 + positions % 64
    _store_keys(pool, slots, keys)
    read, scales = pool.read_index(0, torch.tensor([pages]))
    assert scales is None
    torch.testing.assert_close(read[0], keys, rtol=1e-6, atol=1e-6)


def test_fp8_latent_needs_whole_blocks() -> None:
    odd = dataclasses.replace(MODEL, kv_lora_rank=64)
    with pytest.raises(ValueError, match="kv_lora_rank"):
        KVPool(odd, 1, "fp8_e4m3", "float32", torch.device("cpu"))
