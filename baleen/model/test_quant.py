"""Checkpoint formats: which tensor is stored how, and the two conversions, against plain loops and `transformers`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baleen.model import quant
from baleen.model.quant import convert_to_fp8, dequantize_checkpoint, dequantize_rows, official_dtype
from baleen.model.shards import WeightError

E4M3 = torch.float8_e4m3fn
# The table of the released checkpoint's headers.
RELEASED = {
    "F8_E4M3": [
        "model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.q_b_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.indexer.wq_b.weight",
        "model.layers.0.self_attn.indexer.wk.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight",
        "model.layers.3.mlp.experts.255.gate_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.3.mlp.experts.0.down_proj.weight", "model.layers.61.mlp.shared_experts.down_proj.weight",
    ],
    "BF16": [
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.3.mlp.gate.weight",
        "model.layers.0.self_attn.indexer.weights_proj.weight", "model.layers.61.eh_proj.weight",
        "model.layers.61.shared_head.head.weight", "model.layers.61.embed_tokens.weight",
    ],
    "F32": [
        "model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight", "model.layers.0.self_attn.kv_a_layernorm.weight",
        "model.layers.0.self_attn.indexer.k_norm.weight", "model.layers.0.self_attn.indexer.k_norm.bias",
        "model.layers.3.mlp.gate.e_score_correction_bias", "model.layers.61.enorm.weight",
        "model.layers.61.hnorm.weight", "model.layers.61.shared_head.norm.weight",
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", RELEASED)
def test_official_dtype(dtype: str) -> None:
    assert {name: official_dtype(name) for name in RELEASED[dtype]} == dict.fromkeys(RELEASED[dtype], dtype)


def test_official_dtype_refuses_unknown_names() -> None:
    with pytest.raises(WeightError, match=r"layers\.0\.self_attn\.k_proj\.weight is not a tensor of"):
        official_dtype("model.layers.0.self_attn.k_proj.weight")


@pytest.mark.parametrize("first", [0, 128, 512])
def test_dequantize_rows(first: int) -> None:
    weight = torch.randn(576, 70).to(E4M3)
    scale = torch.rand(5, 1)
    last = min(first + 256, 576)
    values, scales = weight.float().tolist(), scale.tolist()
    expected = [[v * scales[i // 128][0] for v in values[i]] for i in range(first, last)]
    torch.testing.assert_close(
        dequantize_rows(weight[first:last], scale, first), torch.tensor(expected), rtol=1e-6, atol=0
    )


# Conversions

Q_A = "model.layers.0.self_attn.q_a_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"
CONFIG = {"model_type": "deepseek_v32", "hidden_size": 130, "dtype": "float32", "eos_token_id": 1}


def plain_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by the safetensors library, each from the shard the index names, and the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        stored = load_file(folder / file)
        assert sorted(stored) == sorted(name for name, at in index["weight_map"].items() if at == file)
        tensors |= stored
    return tensors, index


def test_convert_to_fp8(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 130, generator=generator) * torch.logspace(-3, 1, 200)[:, None]
    weight[128:, 128:] = 0.0
    tensors = {Q_A: weight, NORM: torch.randn(130).bfloat16(), EMBED: torch.randn(7, 130)}
    source = plain_folder(tmp_path / "plain", tensors)
    convert_to_fp8(source, tmp_path / "fp8", shard_bytes=20_000)
    stored, index = read_folder(tmp_path / "fp8")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        Q_A: E4M3, Q_A + "_scale_inv": torch.float32, NORM: torch.float32, EMBED: torch.bfloat16,
    }  # fmt: skip
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert len(set(index["weight_map"].values())) == 3
    assert torch.equal(stored[NORM], tensors[NORM].float())
    assert torch.equal(stored[EMBED], tensors[EMBED].bfloat16())
    scale = stored[Q_A + "_scale_inv"]
    assert scale.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            amax, s = max(float(weight[block].abs().max()), 1e-4), float(scale[i, j])
            assert math.frexp(s)[0] == 0.5, "not a power of two"
            assert s / 2 < amax / 448 <= s, "not the smallest power of two that fits"
            error = (stored[Q_A][block].float() * s - weight[block]).abs()
            # Half a step: 3 mantissa bits, and below 2^-6 a fixed step of 2^-9.
            assert (error <= torch.maximum(weight[block].abs() * 2**-4, torch.tensor(s * 2**-10))).all()


def test_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    """Odd FP8 sizes between wider tensors: readers that map the file may refuse a float32 at an odd address."""
    tensors = {name: torch.ones(3, 5) for name in RELEASED["F8_E4M3"][:13]} | {
        NORM: torch.ones(3),
        EMBED: torch.ones(3, 5),
    }
    convert_to_fp8(plain_folder(tmp_path / "plain", tensors), tmp_path / "fp8")
    raw = (tmp_path / "fp8" / "model-00001-of-00001.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = {name: entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
    itemsize = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    assert {entry["dtype"] for entry in entries.values()} == set(itemsize)
    assert all((8 + length + entry["data_offsets"][0]) % itemsize[entry["dtype"]] == 0 for entry in entries.values())


def test_convert_to_fp8_config_and_other_files(tmp_path: Path) -> None:
    convert_to_fp8(plain_folder(tmp_path / "plain", {NORM: torch.ones(130)}), tmp_path / "fp8")
    assert json.loads((tmp_path / "fp8" / "config.json").read_text()) == {
        "model_type": "deepseek_v32", "hidden_size": 130, "eos_token_id": 1, "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
        },
    }  # fmt: skip
    assert (tmp_path / "fp8" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in (tmp_path / "fp8").iterdir()) == [
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scale = torch.randn(129, 130).to(E4M3), torch.rand(2, 2)
    tensors = {
        Q_A: weight, Q_A + "_scale_inv": scale, NORM: torch.tensor([1.00390625]), EMBED: torch.ones(2, 2).bfloat16(),
    }  # fmt: skip
    dequantize_checkpoint(plain_folder(tmp_path / "fp8", tensors), tmp_path / "plain", dtype)
    stored, _ = read_folder(tmp_path / "plain")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {Q_A: dtype, NORM: torch.float32, EMBED: dtype}
    values, scales = weight.float().tolist(), scale.tolist()
    expected = torch.tensor(
        [[v * scales[i // 128][j // 128] for j, v in enumerate(row)] for i, row in enumerate(values)]
    )
    assert torch.equal(stored[Q_A], expected.to(dtype))
    assert stored[NORM].item() == 1.00390625
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config


def test_there_and_back_changes_nothing_more(tmp_path: Path) -> None:
    source = plain_folder(tmp_path / "a", {Q_A: torch.randn(200, 130)})
    convert_to_fp8(source, tmp_path / "b")
    dequantize_checkpoint(tmp_path / "b", tmp_path / "c", torch.float32)
    convert_to_fp8(tmp_path / "c", tmp_path / "d")
    dequantize_checkpoint(tmp_path / "d", tmp_path / "e", torch.float32)
    assert torch.equal(read_folder(tmp_path / "c")[0][Q_A], read_folder(tmp_path / "e")[0][Q_A])


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    fp8 = {Q_A: torch.ones(4, 4).to(E4M3), Q_A + "_scale_inv": torch.ones(1, 1)}
    nan = {Q_A: torch.ones(4, 4).to(E4M3), Q_A + "_scale_inv": torch.full((1, 1), float("nan"))}

    def to_float(source: Path, destination: Path) -> None:
        dequantize_checkpoint(source, destination, torch.float32)

    cases: list[tuple[dict[str, Tensor], Callable[[Path, Path], None], str]] = [
        (fp8, convert_to_fp8, "q_a_proj.* is quantised already"),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(4, 4)}, convert_to_fp8, "k_proj.weight is not a tensor"),
        ({NORM: torch.ones(4)}, to_float, "holds no FP8 weight"),
        ({Q_A: fp8[Q_A]}, to_float, "q_a_proj.weight_scale_inv are missing"),
        ({**fp8, NORM + "_scale_inv": torch.ones(1, 1)}, to_float, "layernorm.weight_scale_inv .* has no weight"),
        (nan, to_float, "q_a_proj.weight_scale_inv .*NaN"),
    ]
    for number, (tensors, convert, message) in enumerate(cases):
        source = plain_folder(tmp_path / str(number), tensors)
        with pytest.raises(WeightError, match=message):
            convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(len(cases))]
    with pytest.raises(FileExistsError, match="exists"):
        to_float(tmp_path / "0", tmp_path / "1")
    with pytest.raises(ValueError, match="float16"):
        dequantize_checkpoint(tmp_path / "0", tmp_path / "out", torch.float16)


def test_converts_what_transformers_saves(tmp_path: Path) -> None:
    """transformers saves shards, we convert to FP8 and back, transformers loads it: nothing missing, FP8's values."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=32, kv_lora_rank=160, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, index_n_heads=16,
        index_head_dim=32, index_topk=8, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    original = DeepseekV32ForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert_to_fp8(tmp_path / "hf", tmp_path / "fp8", shard_bytes=100_000)
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", torch.float32, shard_bytes=100_000)
    loaded, info = DeepseekV32ForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    got, expected = loaded.state_dict(), original.state_dict()
    kv_a = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    difference = (got[kv_a] - expected[kv_a]).abs()
    assert 0 < difference.max() <= 2**-4 * expected[kv_a].abs().max()
    assert torch.equal(got["model.norm.weight"], expected["model.norm.weight"])
    assert quant.scale_shape(tuple(got[kv_a].shape)) == (2, 1)
