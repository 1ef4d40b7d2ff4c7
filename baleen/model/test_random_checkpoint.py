"""The random checkpoint: its form against `transformers` and the released checkpoint, determinism, broken builds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from baleen.config import PUBLISHED, ModelConfig
from baleen.model.quant import dequantize_checkpoint, official_specs
from baleen.model.random_checkpoint import (
    SIZES,
    build_random_checkpoint,
    official_config,
    random_state_dict,
    tensor_shapes,
    write_random_checkpoint,
)
from baleen.model.shards import ShardWriter

PROMPT = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_checkpoint(tmp_path_factory.mktemp("random") / "tiny", size="tiny")


def stored(folder: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_transformers_loads_it_dequantised(tiny: Path, tmp_path: Path) -> None:
    """Every name and shape is one transformers expects, none is missing, and the logits are worth sampling from."""
    from transformers import DeepseekV32ForCausalLM

    dequantize_checkpoint(tiny, tmp_path / "plain", torch.float32)
    model, info = DeepseekV32ForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    mtp = f"model.layers.{config_of(tiny)['num_hidden_layers']}."
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(mtp) for name in info["unexpected_keys"])
    ids = torch.tensor([Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(PROMPT + "x" * 90).ids])
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert 1.0 < logits.std() < 4.0
    assert len(set(logits.argmax(-1).tolist())) > 5
    printable = torch.softmax(logits, -1)[:, 3 + 32 : 3 + 127].sum(-1)
    assert printable.mean() > 0.8


def test_mtp_layer_is_complete(tiny: Path) -> None:
    """The MTP layer is a MoE layer of the main model and six tensors of its own, two of them copies."""
    tensors = stored(tiny)
    main = {name.removeprefix("model.layers.1.") for name in tensors if name.startswith("model.layers.1.")}
    mtp = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    own = {"enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"}
    assert mtp - main == {f"{name}.weight" for name in own}
    assert main <= mtp
    hidden = config_of(tiny)["hidden_size"]
    assert tensors["model.layers.2.eh_proj.weight"].shape == (hidden, 2 * hidden)
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])


def test_dtypes_count_like_the_released_checkpoint() -> None:
    """By the table of the released checkpoint: per layer 7 FP8 weights in attention, 3 per MLP or expert, and so on."""
    shapes = random_state_dict(official_config(hidden_size=32, intermediate_size=32, moe_intermediate_size=32))
    counts = Counter(tensor.dtype for name, tensor in shapes.items() if not name.endswith("_scale_inv"))
    layers, dense, experts = 7, 1, 16
    fp8 = layers * 7 + dense * 3 + (layers - dense) * 3 * (experts + 1)
    assert counts[torch.float8_e4m3fn] == fp8 == sum(name.endswith("_scale_inv") for name in shapes)
    assert counts[torch.bfloat16] == 2 + layers + (layers - dense) + 3
    assert counts[torch.float32] == layers * 6 + (layers - dense) + 1 + 3
    kv_a = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert shapes[kv_a].shape == (576, 32)
    assert shapes[kv_a + "_scale_inv"].shape == (5, 1)
    for name in ("q_a_proj", "kv_b_proj"):
        scale = shapes[f"model.layers.0.self_attn.{name}.weight_scale_inv"]
        assert (torch.frexp(scale).mantissa == 0.5).all()


def test_released_counts() -> None:
    """With the released numbers, the released checkpoint: 92,425 tensors of 689,471,107,200 bytes."""
    shapes = tensor_shapes(PUBLISHED["deepseek-ai/DeepSeek-V3.2"])
    specs = [spec for name, shape in shapes.items() for spec in official_specs(name, shape)]
    assert (len(specs), sum(spec.num_bytes for spec in specs)) == (92_425, 689_471_107_200)
    counts = Counter(spec.dtype for spec in specs if not spec.name.endswith("_scale_inv"))
    assert counts == {"F8_E4M3": 45_932, "BF16": 126, "F32": 314 + 121}


@pytest.mark.parametrize("size", SIZES)
def test_config_is_accepted_and_official(size: str) -> None:
    config = official_config(**SIZES[size])
    model = ModelConfig.from_json(config)
    assert model.unsupported == ()
    assert model.quantization is not None
    assert model.rope is not None
    assert model.num_nextn_predict_layers == 1
    assert model.max_position_embeddings == model.rope.factor * model.rope.original_max_position_embeddings
    assert (config["architectures"], config["model_type"]) == (["DeepseekV32ForCausalLM"], "deepseek_v32")
    assert config["num_key_value_heads"] == config["num_attention_heads"]


def test_is_sharded_with_a_true_index(tiny: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "x", official_config(**SIZES["tiny"]), shard_bytes=200_000)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):
        listed = {name for name, at in index["weight_map"].items() if at == file}
        assert set(load_file(tmp_path / "x" / file)) == listed
    resharded, once = stored(tmp_path / "x"), stored(tiny)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in resharded.values())
    assert resharded.keys() == once.keys()
    assert all(torch.equal(tensor.float(), once[name].float()) for name, tensor in resharded.items())


def test_same_seed_same_bytes(tiny: Path, tmp_path: Path) -> None:
    assert files(build_random_checkpoint(tmp_path / "again", size="tiny")) == files(tiny)
    other = files(build_random_checkpoint(tmp_path / "other", size="tiny", seed=1))
    assert other["config.json"] == files(tiny)["config.json"]
    assert all(raw != other[name] for name, raw in files(tiny).items() if name.endswith(".safetensors"))


def test_plain_form_has_the_same_values(tiny: Path, tmp_path: Path) -> None:
    """The FP8 form is the quantised plain form: within half an e4m3 step of each value."""
    write_random_checkpoint(tmp_path / "plain", official_config(**SIZES["tiny"]), quantized=False, dtype=torch.float32)
    plain = stored(tmp_path / "plain")
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    config = config_of(tmp_path / "plain")
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    fp8 = stored(tiny)
    assert set(plain) == {name for name in fp8 if not name.endswith("_scale_inv")}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    value, scale = plain[name], fp8[name + "_scale_inv"].item()
    error = (fp8[name].float() * scale - value).abs()
    assert (error <= torch.maximum(value.abs() * 2**-4, torch.tensor(scale * 2**-10))).all()
    bf16 = random_state_dict(official_config(**SIZES["tiny"]), quantized=False)
    assert torch.equal(bf16[name], value.bfloat16())


def test_interrupted_build_leaves_nothing_and_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: ShardWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_random_checkpoint(tmp_path / "x", size="tiny")
    assert list(tmp_path.iterdir()) == []
    assert (build_random_checkpoint(tmp_path / "x", size="tiny") / "config.json").is_file()


def test_rebuilds_only_what_differs_and_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_random_checkpoint(tmp_path / "x", size="tiny")
    before = (folder / "config.json").stat().st_ino
    build_random_checkpoint(folder, size="tiny")
    assert (folder / "config.json").stat().st_ino == before
    old = files(folder)
    assert files(build_random_checkpoint(folder, size="tiny", seed=1)) != old
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="mine"):
        build_random_checkpoint(tmp_path / "mine", size="tiny")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_tokenizer(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config_of(tiny)["vocab_size"]
    assert tokenizer.encode("Az é").ids == [3 + byte for byte in "Az é".encode()]
    every_byte = "".join(map(chr, range(0x250))) + "鲸 🐋\n"
    ids = tokenizer.encode(every_byte).ids
    assert ids == [3 + byte for byte in every_byte.encode()]
    assert tokenizer.decode(ids) == every_byte
    special = tokenizer.encode(PROMPT).ids
    assert special[0] == 0
    assert [tokenizer.id_to_token(i) for i in special if i < 3 or i >= 3 + 256] == [
        "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "</think>",
    ]  # fmt: skip
    assert len(special) == 4 + len("Hi")
    assert tokenizer.decode(special) == "<｜User｜>Hi<｜Assistant｜></think>"
    assert tokenizer.decode(special, skip_special_tokens=False) == PROMPT
    assert [tokenizer.token_to_id(t) for t in ("<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")] == [1, 2]
    for token in ("｜DSML｜", "<think>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜fim▁hole｜>"):
        assert len(tokenizer.encode(token).ids) == 1


def test_transformers_loads_the_tokenizer(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.encode("Hi") == [3 + ord("H"), 3 + ord("i")]
