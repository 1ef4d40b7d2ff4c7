"""The arithmetic against published sizes of the released model, and against tensors that torch really allocates."""

from __future__ import annotations

import pytest

from baleen import memory_plan
from baleen.config import PUBLISHED, ModelConfig

FP8 = ("blocks", "absorbed")
V32 = ModelConfig.from_json(PUBLISHED["deepseek-ai/DeepSeek-V3.2"])


def test_released_checkpoint_to_the_byte() -> None:
    """689,471,107,200 bytes of payload in 163 files, from an audit of their headers; so are the counts by dtype."""
    assert sum(memory_plan.checkpoint_bytes(V32).values()) == 689_471_107_200
    stored = [storage for _, _, storage in memory_plan.tensors(V32)]
    assert (stored.count("blocks") + stored.count("absorbed"), stored.count("plain"), stored.count("float32")) == (
        45_932,
        126,
        314 + 121,
    )


def test_classes_of_the_released_checkpoint() -> None:
    sizes = memory_plan.checkpoint_bytes(V32)
    assert sizes["attention"] == pytest.approx(11.4e9, rel=0.01)
    assert sizes["mtp"] == pytest.approx(15.4e9, rel=0.01)
    assert sizes["routed experts"] == pytest.approx(653.9e9, rel=0.001)
    assert sizes["embedding"] == 129280 * 7168 * 2


def test_loaded_for_a_cpu_is_four_bytes_a_parameter() -> None:
    sizes = memory_plan.loaded_bytes(V32, "float32")
    # The released index counts elements, block scales included: its total_size is twice that.
    scales = sum(-(-s[0] // 128) * -(-s[1] // 128) for _, s, storage in memory_plan.tensors(V32) if storage in FP8)
    assert sum(sizes.values()) // 4 + scales == 1_370_793_842_752 // 2
    assert sizes["head"] == 4 * (129280 * 7168 + 7168)


def test_loaded_for_a_gpu_is_the_files_and_two_bytes_for_what_is_absorbed() -> None:
    """kv_b_proj [32768, 512] of 62 layers is one byte a value in the files and two here."""
    kept, stored = memory_plan.loaded_bytes(V32, "bfloat16", keep_fp8=True), memory_plan.checkpoint_bytes(V32)
    kv_b = 32768 * 512 - 4 * 256 * 4
    assert kept["attention"] - stored["attention"] == 61 * kv_b
    for name in ("router", "routed experts", "shared experts", "dense mlp", "embedding", "head", "indexer"):
        assert kept[name] == stored[name]


@pytest.mark.parametrize(
    ("kv", "index", "size"),
    [
        ("bfloat16", "fp8_e4m3", 1152 + 132),
        ("fp8_e4m3", "fp8_e4m3", 656 + 132),
        ("float32", "float32", 576 * 4 + 128 * 4),
        ("float32", "fp8_e4m3", 576 * 4 + 132),
    ],
)
def test_bytes_of_a_cached_token(kv: str, index: str, size: int) -> None:
    assert memory_plan.token_bytes(V32, kv, index) == 61 * size


def test_totals_of_a_cached_token_as_published() -> None:
    assert memory_plan.token_bytes(V32, "bfloat16", "fp8_e4m3") == 78_324
    assert memory_plan.token_bytes(V32, "fp8_e4m3", "fp8_e4m3") == 48_068


def test_index_logits_grow_with_step_and_context() -> None:
    """A 512-token chunk at 128k context: 268 MB of logits. 8192 tokens have 4.3 GB, made a part at a time."""

    def logits(tokens: int) -> int:
        sizes = {"rows": 64, "context": 131072, "dense": 4096}
        kinds = {"dtype": "float32", "index_cache_dtype": "fp8_e4m3"}
        return memory_plan.step_bytes(V32, tokens=tokens, **sizes, **kinds)["index logits"]  # type: ignore[arg-type]

    assert logits(512) == pytest.approx(268e6 + 2**25, rel=0.01)
    assert logits(8192) == 2**30 + 2**25
