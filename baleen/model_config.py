"""The model, as the checkpoint's config.json describes it: read, checked, and refused by the name of the field.

The names are re-exported by `baleen.config`; import them from there. `PUBLISHED` holds the released models' numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be. `field` is the flag or the config.json key; the message names it and the fix."""

    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(f"{field}: {problem}; {fix}")
        self.field = field


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Yarn. `mscale` scales cos and sin, `mscale_all_dim` the softmax; the checkpoints have both or neither."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFp8:
    """E4M3 weights with one fp32 `weight_scale_inv` per block; a last block may be partial."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """config.json of the checkpoint, checked; names as there.

    dtype           of the tensors that are not block-quantised
    eos_token_ids   any of them ends a request; may be empty
    unsupported     what the file asks for that the engine cannot do, one line each; `flags.resolve` refuses them
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    moe_layer_freq: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    dtype: str
    rope: RopeScaling | None
    quantization: BlockFp8 | None
    unsupported: tuple[str, ...] = ()

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim ** -0.5, times yarn's amplitude squared."""
        amplitude = 1.0
        if self.rope is not None and self.rope.factor > 1.0:
            amplitude = 0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor) + 1.0
        return self.qk_head_dim**-0.5 * amplitude * amplitude

    def is_moe_layer(self, layer: int) -> bool:
        """True if `layer` has routed experts. The MTP layers, numbered from num_hidden_layers on, have."""
        return layer >= self.first_k_dense_replace

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> ModelConfig:
        """Check a parsed config.json. Floats are accepted for ints where they are whole. Raises ConfigError."""
        keys = _Keys(raw)
        if raw.get("index_topk") is None:
            raise keys.error(
                "index_topk",
                "missing, so this is a dense V3/R1 checkpoint, and baleen serves the DSA family",
                "use a DeepSeek-V3.2 checkpoint",
            )
        rope_theta, rope = _rope(keys)
        quantization, unsupported = _quantization(keys)
        first_k_dense_replace = keys.integer("first_k_dense_replace", least=0)
        model = ModelConfig(
            **{name: keys.integer(name, least=1) for name in _POSITIVE},
            num_nextn_predict_layers=keys.integer("num_nextn_predict_layers", least=0, default=0),
            n_shared_experts=keys.integer("n_shared_experts", least=0),
            routed_scaling_factor=keys.number("routed_scaling_factor"),
            norm_topk_prob=keys.boolean("norm_topk_prob"),
            first_k_dense_replace=first_k_dense_replace,
            moe_layer_freq=keys.integer("moe_layer_freq", least=1, default=1),
            rope_theta=rope_theta,
            rms_norm_eps=keys.number("rms_norm_eps"),
            bos_token_id=None if raw.get("bos_token_id") is None else keys.integer("bos_token_id", least=0),
            eos_token_ids=_eos(keys),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
            dtype=_dtype(keys),
            rope=rope,
            quantization=quantization,
            unsupported=(*unsupported, *_unbuilt(keys, first_k_dense_replace)),
        )
        _check_fixed(keys)
        _check_together(model, keys)
        return model


_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk",
    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "max_position_embeddings",
)  # fmt: skip


class _Keys:
    """Typed reads of one JSON object; `where` is its place in the file, for the messages."""

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self.raw = raw
        self.where = where

    def error(self, name: str, problem: str, fix: str) -> ConfigError:
        return ConfigError(self.where + name, problem, f"{fix} (config.json)")

    def _get(self, name: str, default: Any, wanted: str) -> Any:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing", f"add it: {wanted}")
        return value

    def integer(self, name: str, *, least: int, default: int | None = None) -> int:
        wanted = f"a whole number of at least {least}"
        value = self._get(name, default, wanted)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise self.error(name, f"{value!r} is not a whole number", f"write {wanted}")
        if value < least:
            raise self.error(name, f"{value} is below {least}", f"write {wanted}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default, "a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, f"{value!r} is not a positive number", "write one")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is not true or false", "write one of them")
        return value

    def object(self, name: str) -> _Keys | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, f"{value!r} is not an object", "write {...} or null")
        return _Keys(value, f"{self.where}{name}.")

    def words(self, name: str) -> list[str] | None:
        value = self.raw.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
            raise self.error(name, f"{value!r} is not a list of words", "write one word for each layer, or null")
        return value


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Both spellings: `rope_theta` + `rope_scaling` {type}, and `rope_parameters` {rope_type, rope_theta}."""
    old, new = keys.object("rope_scaling"), keys.object("rope_parameters")
    if old is not None and new is not None and dict(old.raw) != dict(new.raw):
        raise keys.error("rope_parameters", "given together with a different rope_scaling", "keep one of the two")
    scaling = old or new
    holder = scaling if scaling is not None and "rope_theta" in scaling.raw else keys
    theta = holder.number("rope_theta")
    if keys.raw.get("rope_theta", theta) != theta:
        raise holder.error("rope_theta", f"{theta} here and {keys.raw['rope_theta']} at the top", "keep one of the two")
    if scaling is None:
        return theta, None
    kind = scaling.raw.get("rope_type", scaling.raw.get("type"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise scaling.error("rope_type", f"{kind!r} is not one this model family uses", "write 'yarn' or 'default'")
    for name, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1)):
        if scaling.raw.get(name, only) != only:
            raise scaling.error(name, f"{scaling.raw[name]!r} is not built", "remove it")
    if bool(scaling.raw.get("mscale")) != bool(scaling.raw.get("mscale_all_dim")):
        raise scaling.error("mscale", "mscale and mscale_all_dim go together", "give both, or neither")
    given = bool(scaling.raw.get("mscale"))
    rope = RopeScaling(
        factor=scaling.number("factor"),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings", least=1),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        mscale=scaling.number("mscale") if given else 1.0,
        mscale_all_dim=scaling.number("mscale_all_dim") if given else 0.0,
    )
    if rope.factor < 1.0:
        raise scaling.error("factor", f"{rope.factor} is below 1", "yarn extends the context: write 1 or more")
    if rope.beta_fast < rope.beta_slow:
        raise scaling.error("beta_fast", f"{rope.beta_fast} is below beta_slow {rope.beta_slow}", "swap them")
    return theta, rope


def _quantization(keys: _Keys) -> tuple[BlockFp8 | None, tuple[str, ...]]:
    """FP8 with 128x128 blocks and dynamic activations, nothing, or what it would need."""
    section = keys.object("quantization_config")
    if section is None:
        return None, ()
    method = section.raw.get("quant_algo") or section.raw.get("quant_method")
    if method is None:
        raise section.error("quant_method", "missing", "write 'fp8', or remove quantization_config")
    block = section.raw.get("weight_block_size")
    if method != "fp8" or block is None:
        kind = method if method != "fp8" else "fp8 without weight_block_size"
        return None, (f"quantization_config {kind}: needs its weight format and kernels, not built yet",)
    if not isinstance(block, list | tuple) or list(block) != [128, 128]:
        raise section.error("weight_block_size", f"{block!r} is not [128, 128]", "requantise with 128x128 blocks")
    for name, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if section.raw.get(name, only) != only:
            raise section.error(name, f"{section.raw[name]!r} is not {only!r}", f"requantise with {name} {only!r}")
    scale_fmt = section.raw.get("scale_fmt")
    if scale_fmt not in (None, "ue8m0"):
        raise section.error("scale_fmt", f"{scale_fmt!r} is not known", "write 'ue8m0' or remove it")
    return BlockFp8(scale_fmt=scale_fmt), ()


def _eos(keys: _Keys) -> tuple[int, ...]:
    value = keys.raw.get("eos_token_id", keys)
    if value is keys:
        raise keys.error(
            "eos_token_id", "missing, so no reply would ever end", "add it: a token id, a list of them, or null"
        )
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(i, int | float) and not isinstance(i, bool) and i == i // 1 and i >= 0 for i in ids):
        raise keys.error("eos_token_id", f"{value!r} is not a token id or a list of them", "write e.g. 1 or [1]")
    return tuple(int(i) for i in ids)


def _dtype(keys: _Keys) -> str:
    """transformers 5 writes `dtype`, older ones `torch_dtype`; it leaves the key out for float32."""
    name = "dtype" if keys.raw.get("dtype") is not None else "torch_dtype"
    value = keys.raw.get(name) or "float32"
    if value not in ("bfloat16", "float32"):
        raise keys.error(name, f"{value!r} is not a dtype this family is saved in", "convert to bfloat16 or float32")
    return str(value)


def _unbuilt(keys: _Keys, first_k_dense_replace: int) -> tuple[str, ...]:
    """Keys of related models (GLM-5, IndexCache variants) that change the maths: refused by name, never ignored."""
    plain: tuple[tuple[str, tuple[Any, ...], str], ...] = (
        ("index_topk_freq", (None, 1), "reuse of a layer's selection by the next layers (IndexCache)"),
        ("index_topk_pattern", (None,), "reuse of a layer's selection by the next layers (IndexCache)"),
        ("index_skip_topk_offset", (None,), "reuse of a layer's selection by the next layers (IndexCache)"),
        ("cli_factor", (None, 1), "reuse of a layer's selection by the next layers (IndexCache)"),
        ("index_share_for_mtp_iteration", (None, False), "a selection shared between draft steps"),
        ("indexer_rope_interleave", (None, False), "interleaved rope in the indexer"),
        ("rope_interleave", (None, True), "half-split rope in the attention"),
        ("index_k_norm_type", (None, "layernorm"), "another norm of the index key"),
    )
    odd = [(name, what) for name, fine, what in plain if keys.raw.get(name) not in fine]
    lines = [f"{name} {keys.raw[name]!r}: needs {what}, not built yet" for name, what in odd]
    layers = keys.words("mlp_layer_types")
    if layers is not None:
        count = min(first_k_dense_replace, len(layers))
        if layers != ["dense"] * count + ["sparse"] * (len(layers) - count):
            lines.append("mlp_layer_types: needs dense layers after the first sparse one, not built yet")
    kinds = set(keys.words("layer_types") or ()) - {"deepseek_sparse_attention"}
    lines += [f"layer_types {kind!r}: needs another attention than DSA, not built yet" for kind in sorted(kinds)]
    return tuple(lines)


def _check_fixed(keys: _Keys) -> None:
    """What every model of the family has in common; a file may leave these keys out."""
    fixed: tuple[tuple[str, Any], ...] = (
        ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("hidden_act", "silu"), ("attention_bias", False),
        ("mlp_bias", False), ("tie_word_embeddings", False), ("moe_layer_freq", 1),
    )  # fmt: skip
    named = keys.words("architectures")
    if named and not any(name.startswith(("DeepseekV32", "DeepseekV3For")) for name in named):
        raise keys.error("architectures", f"{named} is another model", "use a DeepSeek-V3.2 checkpoint")
    for name, only in fixed:
        value = keys.raw.get(name)
        if value is not None and value != only:
            raise keys.error(name, f"{value!r} is not {only!r}", f"this model family has {only!r} only")


def _check_together(m: ModelConfig, keys: _Keys) -> None:
    """Numbers that contradict each other."""

    def check(fine: bool, name: str, problem: str, fix: str) -> None:
        if not fine:
            raise keys.error(name, problem, fix)

    experts, group = m.n_routed_experts, m.n_group
    check(experts % group == 0, "n_group", f"{group} does not divide n_routed_experts {experts}", "write a divisor")
    check(m.topk_group <= group, "topk_group", f"{m.topk_group} is above n_group {group}", f"write at most {group}")
    # A group's score is the sum of its best two experts.
    check(experts >= 2 * group, "n_group", f"{group} groups of {experts} experts have fewer than 2 each", "write fewer")
    kept = m.topk_group * (experts // group)
    per_token = m.num_experts_per_tok
    check(
        per_token <= kept,
        "num_experts_per_tok",
        f"{per_token} is above the {kept} experts of the {m.topk_group} kept groups",
        f"write at most {kept}",
    )
    head, rope = m.index_head_dim, m.qk_rope_head_dim
    check(head & (head - 1) == 0, "index_head_dim", f"{head} is not a power of two", "the Hadamard transform needs one")
    check(head >= rope, "index_head_dim", f"{head} is below qk_rope_head_dim {rope}", f"write at least {rope}")
    check(rope % 2 == 0, "qk_rope_head_dim", f"{rope} is odd", "rope turns pairs: write an even number")
    dense, layers = m.first_k_dense_replace, m.num_hidden_layers
    check(dense <= layers, "first_k_dense_replace", f"{dense} is above num_hidden_layers {layers}", f"at most {layers}")
    for name, ids in (("eos_token_id", m.eos_token_ids), ("bos_token_id", (m.bos_token_id or 0,))):
        check(
            all(i < m.vocab_size for i in ids), name, f"{ids} is outside vocab_size {m.vocab_size}", "write a token id"
        )
    for name in ("layer_types", "mlp_layer_types"):
        listed = keys.raw.get(name)
        check(
            listed is None or len(listed) == layers, name, f"does not list {layers} layers", "one entry for each layer"
        )


# The released config.json (all three of deepseek-ai have the same numbers), for a dry run without the files.
_V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": 129280,
    "hidden_size": 7168, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 2048, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    },
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V3.2-Exp": _V32,
    "deepseek-ai/DeepSeek-V3.2": _V32,
    "deepseek-ai/DeepSeek-V3.2-Speciale": _V32,
    "nvidia/DeepSeek-V3.2-NVFP4": {**_V32, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
}
