"""config.json: what is read, what is refused, and how it is said."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baleen.config import AUTO, PUBLISHED, SECTIONS, BlockFp8, ConfigError, ModelConfig, RopeScaling

V32 = PUBLISHED["deepseek-ai/DeepSeek-V3.2"]


def changed(**keys: Any) -> dict[str, Any]:
    return {**copy.deepcopy(V32), **keys}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in V32.items() if name != key}


def scaling(**keys: Any) -> dict[str, Any]:
    return {**V32["rope_scaling"], **keys}


def test_another_architecture_is_refused_even_if_its_numbers_fit() -> None:
    with pytest.raises(ConfigError, match=r"architectures.*LlamaForCausalLM"):
        ModelConfig.from_json(changed(architectures=["LlamaForCausalLM"]))
    ModelConfig.from_json(changed(architectures=["DeepseekV3ForCausalLM"]))
    ModelConfig.from_json(without("architectures"))


def test_released_numbers() -> None:
    model = ModelConfig.from_json(V32)
    assert model.rope == RopeScaling(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    assert model.quantization == BlockFp8(weight_block_size=(128, 128), scale_fmt="ue8m0")
    assert (model.qk_head_dim, model.eos_token_ids, model.dtype, model.unsupported) == (192, (1,), "bfloat16", ())
    # 192 ** -0.5 * (0.1 * ln(40) + 1) ** 2, as published
    assert model.softmax_scale == pytest.approx(0.135234, abs=5e-7)
    assert [model.is_moe_layer(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def test_softmax_scale_without_yarn() -> None:
    model = ModelConfig.from_json(changed(rope_scaling=None))
    assert model.rope is None
    assert model.softmax_scale == pytest.approx(1 / math.sqrt(192))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs_parse(name: str) -> None:
    model = ModelConfig.from_json(PUBLISHED[name])
    assert (model.unsupported == ()) == name.startswith("deepseek-ai/")


def test_crosses_processes() -> None:
    model = ModelConfig.from_json(V32)
    assert pickle.loads(pickle.dumps(model)) == model
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(model), type=ModelConfig) == model
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.vocab_size = 1  # type: ignore[misc]


ROPE_SPELLINGS = {
    "type": changed(),
    "rope_type": changed(rope_scaling={k: v for k, v in scaling(rope_type="yarn").items() if k != "type"}),
    "both types": changed(rope_scaling=scaling(rope_type="yarn")),
    "rope_parameters": {
        **without("rope_theta"),
        "rope_scaling": None,
        "rope_parameters": scaling(rope_type="yarn", rope_theta=10000.0),
    },
    "floats": changed(rope_theta=1e4, rope_scaling=scaling(original_max_position_embeddings=4096.0, beta_fast=32.0)),
}


@pytest.mark.parametrize("raw", ROPE_SPELLINGS.values(), ids=ROPE_SPELLINGS.keys())
def test_rope_spellings_mean_the_same(raw: dict[str, Any]) -> None:
    assert ModelConfig.from_json(raw) == ModelConfig.from_json(V32)


def test_whole_floats_are_ints() -> None:
    model = ModelConfig.from_json(changed(hidden_size=7168.0, eos_token_id=[1.0, 2]))
    assert (model.hidden_size, model.eos_token_ids) == (7168, (1, 2))
    assert type(model.hidden_size) is int
    assert type(model.eos_token_ids[0]) is int


REQUIRED = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk",
    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace",
    "max_position_embeddings", "rope_theta", "rms_norm_eps", "eos_token_id",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: missing") as caught:
        ModelConfig.from_json(without(key))
    assert caught.value.field == key


@pytest.mark.parametrize("key", sorted(set(REQUIRED) - {"eos_token_id", "norm_topk_prob"}))
@pytest.mark.parametrize("value", ["12", True, [1], -1, math.nan, math.inf])
def test_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(changed(**{key: value}))
    assert caught.value.field == key


BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "experts in groups": ({"n_group": 7}, "n_group", "does not divide"),
    "experts of a group": ({"n_group": 256}, "n_group", "fewer than 2"),
    "kept groups": ({"topk_group": 9}, "topk_group", "at most 8"),
    "experts kept": ({"num_experts_per_tok": 129}, "num_experts_per_tok", "at most 128"),
    "hadamard": ({"index_head_dim": 96}, "index_head_dim", "power of two"),
    "index rope": ({"index_head_dim": 32}, "index_head_dim", "at least 64"),
    "odd rope": ({"qk_rope_head_dim": 63}, "qk_rope_head_dim", "even"),
    "dense layers": ({"first_k_dense_replace": 62}, "first_k_dense_replace", "at most 61"),
    "scoring": ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'"),
    "topk method": ({"topk_method": "greedy"}, "topk_method", "'noaux_tc'"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings", "False"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "'silu'"),
    "bias": ({"attention_bias": True}, "attention_bias", "False"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias", "False"),
    "moe frequency": ({"moe_layer_freq": 2}, "moe_layer_freq", "1"),
    "fraction": ({"hidden_size": 7168.5}, "hidden_size", "whole number"),
    "boolean": ({"norm_topk_prob": 1}, "norm_topk_prob", "true or false"),
    "eos type": ({"eos_token_id": "1"}, "eos_token_id", "token id"),
    "eos range": ({"eos_token_id": 129280}, "eos_token_id", "vocab_size"),
    "half": ({"torch_dtype": "float16"}, "torch_dtype", "bfloat16"),
    "dense checkpoint": ({"index_topk": None}, "index_topk", "dense V3/R1 checkpoint"),
    "rope kind": ({"rope_scaling": scaling(type="linear")}, "rope_scaling.rope_type", "'yarn'"),
    "rope factor": ({"rope_scaling": scaling(factor=0.5)}, "rope_scaling.factor", "below 1"),
    "rope factor missing": ({"rope_scaling": scaling(factor=None)}, "rope_scaling.factor", "missing"),
    "rope mscale": ({"rope_scaling": scaling(mscale_all_dim=0)}, "rope_scaling.mscale", "go together"),
    "rope betas": ({"rope_scaling": scaling(beta_fast=0.5)}, "rope_scaling.beta_fast", "beta_slow"),
    "rope attention factor": ({"rope_scaling": scaling(attention_factor=2)}, "rope_scaling.attention_factor", "built"),
    "rope object": ({"rope_scaling": "yarn"}, "rope_scaling", "not an object"),
    "two ropes": ({"rope_parameters": scaling(factor=2)}, "rope_parameters", "keep one"),
    "two thetas": ({"rope_scaling": scaling(rope_theta=5)}, "rope_scaling.rope_theta", "keep one"),
    "block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "quantization_config.weight_block_size",
        "128",
    ),
    "static fp8": (
        {"quantization_config": {**V32["quantization_config"], "activation_scheme": "static"}},
        "quantization_config.activation_scheme",
        "'dynamic'",
    ),
    "quantization": ({"quantization_config": {}}, "quantization_config.quant_method", "missing"),
    "layer list": ({"layer_types": ["deepseek_sparse_attention"]}, "layer_types", "61"),
}


@pytest.mark.parametrize(("keys", "field", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_contradiction_names_field_and_fix(keys: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(changed(**keys))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert text in str(caught.value)


UNSUPPORTED: list[dict[str, Any]] = [
    {"index_topk_freq": 4},
    {"index_topk_pattern": "FFSS"},
    {"index_skip_topk_offset": 2},
    {"index_share_for_mtp_iteration": True},
    {"indexer_rope_interleave": True},
    {"rope_interleave": False},
    {"index_k_norm_type": "rmsnorm"},
    {"mlp_layer_types": ["sparse"] * 61},
    {"layer_types": ["full_attention"] * 61},
    {"quantization_config": {"quant_method": "w4afp8"}},
    {"quantization_config": {"quant_method": "modelopt_fp4"}},
    {"quantization_config": {"quant_method": "w8a8_int8"}},
    {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
]


@pytest.mark.parametrize("keys", UNSUPPORTED, ids=str)
def test_other_models_maths_is_refused_by_name(keys: dict[str, Any]) -> None:
    (line,) = ModelConfig.from_json(changed(**keys)).unsupported
    (name,) = keys
    assert line.startswith(name)
    assert "needs" in line
    assert line.endswith("not built yet")


@pytest.mark.parametrize("name", ["layer_types", "mlp_layer_types"])
@pytest.mark.parametrize("value", [3, "sparse", [{}], {"a": 1}], ids=str)
def test_a_list_of_words_is_one(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .* is not a list of words"):
        ModelConfig.from_json(changed(**{name: value}))


def test_default_values_of_those_keys_are_fine() -> None:
    fine = changed(
        index_topk_freq=1,
        index_topk_pattern=None,
        indexer_rope_interleave=False,
        rope_interleave=True,
        mlp_layer_types=["dense"] * 3 + ["sparse"] * 58,
    )
    assert ModelConfig.from_json(fine).unsupported == ()


@pytest.mark.parametrize(
    "rope", [None, {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}]
)
def test_saved_by_transformers(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    """transformers leaves out topk_method, scoring_func, moe_layer_freq, MTP layers, and renames rope_scaling."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    parameters = None if rope is None else {"rope_type": "yarn", "rope_theta": 5000.0, **rope}
    saved = transformers.DeepseekV32Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, index_n_heads=16, index_head_dim=16, index_topk=8,
        intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
        topk_group=2, first_k_dense_replace=1, max_position_embeddings=256, rope_parameters=parameters, dtype="float32",
        eos_token_id=[1, 7],
    )  # fmt: skip
    saved._attn_implementation = "eager"
    saved.save_pretrained(tmp_path)
    model = ModelConfig.from_json(json.loads((tmp_path / "config.json").read_text()))
    assert (model.hidden_size, model.index_topk, model.eos_token_ids) == (64, 8, (1, 7))
    assert (model.dtype, model.num_nextn_predict_layers, model.quantization) == ("float32", 0, None)
    assert model.unsupported == ()
    assert model.rope_theta == (10000.0 if rope is None else 5000.0)
    assert (model.rope is None) == (rope is None)
    assert model.softmax_scale == pytest.approx(DeepseekV32Attention(saved, 0).scaling, rel=1e-12)


def test_field_names_are_unique_across_sections() -> None:
    names = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))


def test_an_open_setting_has_no_default() -> None:
    """So that no section can be built with "auto" left in it."""
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            assert field.default != AUTO
            assert (field.default is dataclasses.MISSING) == (field.metadata["default"] == AUTO)
