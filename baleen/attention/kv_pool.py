"""The paged KV pool: every byte layout of the cache, in one place.

Two buffers a layer share one slot numbering, slot = page * 64 + offset; page 0 takes the writes of padding. A slot
that nobody has written holds anything, NaN too: what is read of it (keys past a request's end) counts for nothing.

latent, per slot      float32 / bfloat16: [latent 512 | k_pe 64]
                      fp8_e4m3, 656 bytes: 512 e4m3 latents | 4 float32 scales (one per 128 latents) | 64 bfloat16 k_pe
index keys, per page  float32: 64 x 128
                      fp8_e4m3, 8448 bytes: 64 keys of 128 e4m3 | 64 float32 scales, all keys before all scales

The latent is stored after its norm, k_pe after its rope, the index key after norm and rope, and in fp8 after the
Hadamard transform. Layouts: FlashMLA's and DeepGEMM's documentation of their paged caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.config import PAGE_SIZE, ModelConfig
from baleen.kernels.kv_store import gather_index_fp8, gather_latent_bf16, gather_latent_fp8
from baleen.kernels.mla_inputs import store_keys

QUANT_BLOCK = 128


@dataclass(frozen=True)
class PackedLatent:
    """The 656-byte rows, uint8 [N, 656], and views into them: values [N, 512] e4m3, scales [N, 4] float32, rope [N, 64]
    bfloat16.
    """

    rows: Tensor
    values: Tensor
    scales: Tensor
    rope: Tensor

    @classmethod
    def of(cls, rows: Tensor, latent_dim: int) -> PackedLatent:
        """Views of uint8 rows [N, 656]."""
        scales_end = latent_dim + latent_dim // QUANT_BLOCK * 4
        return cls(
            rows,
            rows[:, :latent_dim].view(torch.float8_e4m3fn),
            rows[:, latent_dim:scales_end].view(torch.float32),
            rows[:, scales_end:].view(torch.bfloat16),
        )


@dataclass(frozen=True)
class PackedIndex:
    """Views into the 8448-byte pages: keys [P, 64, 128] e4m3, scales [P, 64] float32."""

    keys: Tensor
    scales: Tensor

    @classmethod
    def of(cls, pages: Tensor, key_dim: int) -> PackedIndex:
        """Views of uint8 pages [P, 64 * key_dim + 64 * 4]."""
        keys_end = PAGE_SIZE * key_dim
        return cls(
            pages[:, :keys_end].view(torch.float8_e4m3fn).unflatten(1, (PAGE_SIZE, key_dim)),
            pages[:, keys_end:].view(torch.float32),
        )


class KeyNorms(NamedTuple):
    """What a layer's keys go through before they are stored: RMSNorm of the latent, LayerNorm of the index key.

    weights and bias float32: [512]; [128], [128]
    """

    latent_weight: Tensor
    latent_eps: float
    key_weight: Tensor
    key_bias: Tensor
    key_eps: float


class KVPool:
    """The cache of all layers. `num_pages` counts usable pages; page 0 is added to them. Nothing is zeroed: the system
    hands out the memory as it is first written.

    latent[layer]  Tensor [slots, 576] or PackedLatent;  index[layer]  Tensor [pages, 64, 128] or PackedIndex
    """

    def __init__(
        self,
        model: ModelConfig,
        num_pages: int,
        kv_cache_dtype: str,
        index_cache_dtype: str,
        device: torch.device,
    ) -> None:
        self.latent_dim = model.kv_lora_rank
        self.rope_dim = model.qk_rope_head_dim
        self.nope_dim = model.qk_nope_head_dim
        self.key_dim = model.index_head_dim
        pages = num_pages + 1
        self.index_page_bytes = PAGE_SIZE * (self.key_dim + 4 if index_cache_dtype == "fp8_e4m3" else self.key_dim * 4)
        self.latent: list[Tensor | PackedLatent] = []
        self.index: list[Tensor | PackedIndex] = []
        for _ in range(model.num_hidden_layers):
            self.latent.append(self._latent_buffer(pages * PAGE_SIZE, kv_cache_dtype, device))
            self.index.append(self._index_buffer(pages, index_cache_dtype, device))

    def _latent_buffer(self, slots: int, dtype: str, device: torch.device) -> Tensor | PackedLatent:
        if dtype == "fp8_e4m3":
            if self.latent_dim % QUANT_BLOCK:
                raise ValueError(
                    f"--kv-cache-dtype fp8_e4m3 needs kv_lora_rank to be a multiple of {QUANT_BLOCK}, "
                    f"not {self.latent_dim}"
                )
            width = self.latent_dim + self.latent_dim // QUANT_BLOCK * 4 + self.rope_dim * 2
            return PackedLatent.of(torch.empty(slots, width, dtype=torch.uint8, device=device), self.latent_dim)
        return torch.empty(slots, self.latent_dim + self.rope_dim, dtype=getattr(torch, dtype), device=device)

    def _index_buffer(self, pages: int, dtype: str, device: torch.device) -> Tensor | PackedIndex:
        if dtype == "fp8_e4m3":
            size = PAGE_SIZE * self.key_dim + PAGE_SIZE * 4
            return PackedIndex.of(torch.empty(pages, size, dtype=torch.uint8, device=device), self.key_dim)
        return torch.empty(pages, PAGE_SIZE, self.key_dim, dtype=getattr(torch, dtype), device=device)

    def store(
        self,
        layer: int,
        slots: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        index_k: Tensor,
        norms: KeyNorms,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Norm, rotate and write T tokens. slots [T] int64; latent [T, 512], k_pe [T, 64], index_k [T, 128] as
        projected; cos, sin [T, 32] float32.
        """
        rows, keys = self.latent[layer], self.index[layer]
        latent_cache = (rows.values, rows.scales, rows.rope) if isinstance(rows, PackedLatent) else (rows,)
        index_cache = (keys.keys, keys.scales) if isinstance(keys, PackedIndex) else (keys.view(-1, self.key_dim),)
        store_keys(latent, k_pe, index_k, *norms, cos, sin, slots, latent_cache, index_cache)

    def read_latent(self, layer: int, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of `slots` [N] int64 -> [N, 576] in `dtype`."""
        rows = self.latent[layer]
        if not isinstance(rows, PackedLatent):
            return rows.index_select(0, slots).to(dtype)
        if dtype == torch.bfloat16:
            return gather_latent_bf16(rows.values, rows.scales, rows.rope, slots)
        return gather_latent_fp8(rows.values, rows.scales, rows.rope, slots).to(dtype)

    def read_index(self, layer: int, page_table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Index keys of G requests.

        page_table [G, P] int64 -> keys [G, P*64, 128], scales [G, P*64] float32 or None.
        """
        keys = self.index[layer]
        num_requests = page_table.shape[0]
        if isinstance(keys, PackedIndex):
            return gather_index_fp8(keys.keys, keys.scales, page_table)
        # a look at the page table would wait for a GPU
        if num_requests == 1 and page_table.device.type == "cpu" and _is_run(page_table[0]):
            first = int(page_table[0, 0])
            return keys[first : first + page_table.shape[1]].view(1, -1, self.key_dim), None
        return keys[page_table].view(num_requests, -1, self.key_dim), None


def _is_run(pages: Tensor) -> bool:
    """True if the pages follow one another, so that a view can stand for the gathered copy."""
    return bool((pages.diff() == 1).all())
