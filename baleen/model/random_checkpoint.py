"""A random DeepSeek-V3.2 checkpoint in the official format, to serve, test and measure with.

Its text is random, its form is not: official config keys, tensor names, dtypes and block scales, the MTP layer, a
byte-level tokenizer that spells the family's special tokens. Any config of the family can be written, FP8 or plain.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from baleen.model.quant import OFFICIAL_QUANTIZATION, official_specs, official_tensors
from baleen.model.shards import ShardWriter, TensorSpec, new_folder

# Ids 0 to 2, the 256 bytes, then the others, in the order of the released tokenizer. True: a special token, which
# decoding may skip; as released.
FIRST_TOKENS = {"<｜begin▁of▁sentence｜>": True, "<｜end▁of▁sentence｜>": True, "<｜▁pad▁｜>": True}
LAST_TOKENS = {
    "｜DSML｜": True, "<think>": False, "</think>": False,
    "<｜fim▁hole｜>": False, "<｜fim▁begin｜>": False, "<｜fim▁end｜>": False,
    "<｜User｜>": False, "<｜Assistant｜>": False, "<|EOT|>": True,
    "<｜tool▁calls▁begin｜>": False, "<｜tool▁calls▁end｜>": False,
    "<｜tool▁call▁begin｜>": False, "<｜tool▁call▁end｜>": False,
    "<｜tool▁outputs▁begin｜>": False, "<｜tool▁outputs▁end｜>": False,
    "<｜tool▁output▁begin｜>": False, "<｜tool▁output▁end｜>": False, "<｜tool▁sep｜>": False,
}  # fmt: skip
FIRST_BYTE_ID = len(FIRST_TOKENS)
PLACEHOLDERS = 11  # fill the vocabulary to 288, as the released one is filled
VOCAB_SIZE = FIRST_BYTE_ID + 256 + len(LAST_TOKENS) + PLACEHOLDERS
SIZES: dict[str, dict[str, Any]] = {
    # About 32 M parameters and 5 M more in the MTP layer. Latent, rope and index dims are the released model's.
    "small": {},
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "index_head_dim": 64, "index_topk": 64,
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
MARKER_NAME = "random_checkpoint.json"
LAYOUT_VERSION = 1  # raise it when what a seed and a size give changes: folders of older versions are then rebuilt


def official_config(**changes: Any) -> dict[str, Any]:
    """The keys of the released config.json with the numbers of the "small" size, and `changes` on top."""
    heads = changes.get("num_attention_heads", 8)
    return {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": VOCAB_SIZE,
        "hidden_size": 256, "num_hidden_layers": 6, "num_nextn_predict_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": heads, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False, "attention_dropout": 0.0,
        "index_n_heads": 16, "index_head_dim": 128, "index_topk": 256, "intermediate_size": 512,
        "moe_intermediate_size": 256, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "max_position_embeddings": 16384, "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "ep_size": 1,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.2", "quantization_config": OFFICIAL_QUANTIZATION, **changes,
    }  # fmt: skip


def build_random_checkpoint(folder: Path, *, seed: int = 0, size: str = "small") -> Path:
    """The random checkpoint of this seed and size in `folder`: kept when it is there, rebuilt when seed or size differ.

    The folder appears whole or not at all. Raises: FileExistsError when it holds something else.
    """
    marker = {"seed": seed, "size": size, "layout_version": LAYOUT_VERSION}
    if folder.exists() and any(folder.iterdir()):
        try:
            found = json.loads((folder / MARKER_NAME).read_bytes())
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"{folder} is not a random checkpoint of ours: give another folder, or remove it"
            ) from error
        if found == marker:
            return folder
        shutil.rmtree(folder)
    write_random_checkpoint(folder, official_config(**SIZES[size]), seed=seed, marker=marker)
    return folder


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    quantized: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 8 << 20,
    marker: Mapping[str, Any] | None = None,
) -> None:
    """Write a random checkpoint of any config with the official keys; `folder` must not exist, or be empty.

    quantized  the official FP8 form; False: every tensor in `dtype` (bfloat16 or float32), the same before rounding
    """
    stored_config = {key: value for key, value in config.items() if key != "quantization_config"}
    stored_config["torch_dtype"] = str(torch.bfloat16 if quantized else dtype).removeprefix("torch.")
    if quantized:
        stored_config["quantization_config"] = OFFICIAL_QUANTIZATION
    shapes = tensor_shapes(config)
    layout = [spec for name, shape in shapes.items() for spec in _stored_specs(name, shape, quantized, dtype)]
    with new_folder(folder) as partial:
        writer = ShardWriter(partial, layout, shard_bytes)
        for name, tensor in _stored_tensors(config, seed, quantized, dtype):
            writer.add(name, tensor)
        writer.finish()
        _write_json(partial / "config.json", stored_config)
        _write_json(partial / "generation_config.json", {
            "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0,
            "top_p": 0.95,
        })  # fmt: skip
        write_tokenizer(partial, config["max_position_embeddings"])
        if marker is not None:
            _write_json(partial / MARKER_NAME, marker)


def random_state_dict(
    config: Mapping[str, Any], seed: int = 0, *, quantized: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """The tensors `write_random_checkpoint` writes, by name, scales included."""
    return dict(_stored_tensors(config, seed, quantized, dtype))


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, MTP layers included, scales not, in the order of the network."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    main_layers = config["num_hidden_layers"]
    for layer in range(main_layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        if layer >= main_layers:
            shapes |= {
                f"{prefix}embed_tokens.weight": (vocab, hidden),
                f"{prefix}enorm.weight": (hidden,),
                f"{prefix}hnorm.weight": (hidden,),
                f"{prefix}eh_proj.weight": (hidden, 2 * hidden),
                f"{prefix}shared_head.norm.weight": (hidden,),
                f"{prefix}shared_head.head.weight": (vocab, hidden),
            }
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes |= _attention_shapes(f"{prefix}self_attn.", config)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes |= _mlp_shapes(f"{prefix}mlp.", config, moe=layer >= config["first_k_dense_replace"])
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _attention_shapes(prefix: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, q_rank, kv_rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    return {
        f"{prefix}q_a_proj.weight": (q_rank, hidden),
        f"{prefix}q_a_layernorm.weight": (q_rank,),
        f"{prefix}q_b_proj.weight": (heads * (nope + rope), q_rank),
        f"{prefix}kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        f"{prefix}kv_a_layernorm.weight": (kv_rank,),
        f"{prefix}kv_b_proj.weight": (heads * (nope + value), kv_rank),
        f"{prefix}o_proj.weight": (hidden, heads * value),
        f"{prefix}indexer.wq_b.weight": (index_heads * index_dim, q_rank),
        f"{prefix}indexer.wk.weight": (index_dim, hidden),
        f"{prefix}indexer.k_norm.weight": (index_dim,),
        f"{prefix}indexer.k_norm.bias": (index_dim,),
        f"{prefix}indexer.weights_proj.weight": (index_heads, hidden),
    }


def _mlp_shapes(prefix: str, config: Mapping[str, Any], *, moe: bool) -> dict[str, tuple[int, ...]]:
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    widths = {prefix: config["intermediate_size"]}
    shapes: dict[str, tuple[int, ...]] = {}
    if moe:
        shapes[f"{prefix}gate.weight"] = (experts, hidden)
        shapes[f"{prefix}gate.e_score_correction_bias"] = (experts,)
        width = config["moe_intermediate_size"]
        widths = {f"{prefix}experts.{expert}.": width for expert in range(experts)}
        if config["n_shared_experts"]:
            widths[f"{prefix}shared_experts."] = width * config["n_shared_experts"]
    for owner, width in widths.items():
        shapes[f"{owner}gate_proj.weight"] = shapes[f"{owner}up_proj.weight"] = (width, hidden)
        shapes[f"{owner}down_proj.weight"] = (hidden, width)
    return shapes


def _stored_specs(name: str, shape: tuple[int, ...], quantized: bool, dtype: torch.dtype) -> list[TensorSpec]:
    if quantized:
        return official_specs(name, shape)
    return [TensorSpec(name, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype], shape)]


def _stored_tensors(
    config: Mapping[str, Any], seed: int, quantized: bool, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in tensor_shapes(config).items():
        value = _random_tensor(name, shape, seed)
        tensors = official_tensors(name, value) if quantized else [value.to(dtype)]
        for spec, tensor in zip(_stored_specs(name, shape, quantized, dtype), tensors):
            yield spec.name, tensor


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32, a function of name, shape and seed only. Linear layers keep the variance of what they are given."""
    # The MTP layer's embedding and head are copies of the model's own.
    if name.endswith(".embed_tokens.weight"):
        name = "model.embed_tokens.weight"
    elif name.endswith(".shared_head.head.weight"):
        name = "lm_head.weight"
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    noise = torch.from_numpy(generator.standard_normal(prod(shape), dtype=np.float32)).reshape(shape)
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * noise
    if name.endswith("bias"):
        return 0.05 * noise
    if name == "model.embed_tokens.weight":
        return noise
    value = noise * shape[-1] ** -0.5
    if name == "lm_head.weight":
        # Logits of deviation 3, and 0.75 for all but printable ASCII: what is sampled can be read.
        value *= 0.75
        value[FIRST_BYTE_ID + ord(" ") : FIRST_BYTE_ID + ord("~") + 1] *= 4.0
    return value


def write_tokenizer(folder: Path, max_length: int) -> None:
    """tokenizer.json (byte-level, no merges: byte b is token FIRST_BYTE_ID + b) and tokenizer_config.json."""
    vocab = {token: index for index, token in enumerate(FIRST_TOKENS)}
    for byte, character in enumerate(_byte_characters()):
        vocab[character] = FIRST_BYTE_ID + byte
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    placeholders = {f"<｜place▁holder▁no▁{number}｜>": True for number in range(PLACEHOLDERS)}
    for token, special in {**FIRST_TOKENS, **LAST_TOKENS, **placeholders}.items():
        added = AddedToken(token, special=special, normalized=False)
        add: Callable[[list[AddedToken]], int] = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([added])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = FIRST_TOKENS
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad,
        "unk_token": None, "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    })  # fmt: skip


def _byte_characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary (GPT-2's): itself if visible, else one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
