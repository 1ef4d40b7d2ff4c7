"""What the engine will allocate, in bytes, from the configuration alone: weights, KV pool, buffers of a step.

Plain arithmetic, no torch: `flags` sizes the KV pool with it and `--dry-run` prints it. The tensor list is the
checkpoint's; its sum for the released V3.2 agrees with the files to the byte (see the test).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from baleen.config import PAGE_SIZE, Config, ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 1024**3
# index_logits, topk, sparse_mla and dense_mla keep each intermediate under this; on a GPU the selection has several of
# twice its size.
KERNEL_SCRATCH = 32 * 1024**2
GPU_SELECTION_SCRATCH = 512 * 1024**2
# Index logits made at once.
INDEX_LOGITS = 1024**3
# Rows that the grouped products of a GPU's experts keep for each expert beside its own.
EXPERT_ROWS = 256
# int64 [tokens, topk] alive at once where positions become slots.
SELECTION_COPIES = 6
# The sampler's int64 temporaries: four of one chunk of rows.
SAMPLER_SCRATCH = 4 * 16 * 1024**2
# Logits made at once where the logprobs of a prompt are wanted.
PROMPT_LOGITS = 2**23

# A tensor's place in the plan, its shape, and how an FP8 checkpoint stores it:
# "blocks": e4m3 and one fp32 scale per 128x128 block; "absorbed": the same, dequantised wherever it is loaded; "plain":
# as it is; "float32": norms, biases.
Tensor = tuple[str, tuple[int, ...], str]


def tensors(m: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, MTP layers included, as (class, [out, in], storage)."""
    yield "embedding", (m.vocab_size, m.hidden_size), "plain"
    for layer in range(m.num_hidden_layers + m.num_nextn_predict_layers):
        mtp = layer >= m.num_hidden_layers
        for name, shape, storage in _layer(m, m.is_moe_layer(layer)):
            yield "mtp" if mtp else name, shape, storage
        if mtp:
            yield from (("mtp", (m.hidden_size,), "float32") for _ in ("enorm", "hnorm", "shared_head.norm"))
            yield "mtp", (m.hidden_size, 2 * m.hidden_size), "plain"
            yield from (("mtp", (m.vocab_size, m.hidden_size), "plain") for _ in ("embed_tokens", "shared_head.head"))
    yield "head", (m.hidden_size,), "float32"
    yield "head", (m.vocab_size, m.hidden_size), "plain"


def _layer(m: ModelConfig, moe: bool) -> Iterator[Tensor]:
    hidden, heads = m.hidden_size, m.num_attention_heads
    yield "attention", (m.q_lora_rank, hidden), "blocks"
    yield "attention", (heads * m.qk_head_dim, m.q_lora_rank), "blocks"
    yield "attention", (m.kv_lora_rank + m.qk_rope_head_dim, hidden), "blocks"
    yield "attention", (heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank), "absorbed"
    yield "attention", (hidden, heads * m.v_head_dim), "blocks"
    for size in (m.q_lora_rank, m.kv_lora_rank, hidden, hidden):
        yield "attention", (size,), "float32"
    yield "indexer", (m.index_n_heads * m.index_head_dim, m.q_lora_rank), "blocks"
    yield "indexer", (m.index_head_dim, hidden), "blocks"
    yield "indexer", (m.index_n_heads, hidden), "plain"
    yield from (("indexer", (m.index_head_dim,), "float32") for _ in ("weight", "bias"))
    if not moe:
        yield from _mlp("dense mlp", hidden, m.intermediate_size)
        return
    yield "router", (m.n_routed_experts, hidden), "plain"
    yield "router", (m.n_routed_experts,), "float32"
    for _ in range(m.n_routed_experts):
        yield from _mlp("routed experts", hidden, m.moe_intermediate_size)
    if m.n_shared_experts:
        yield from _mlp("shared experts", hidden, m.n_shared_experts * m.moe_intermediate_size)


def _mlp(name: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield name, (inner, hidden), "blocks"
    yield name, (inner, hidden), "blocks"
    yield name, (hidden, inner), "blocks"


def checkpoint_bytes(m: ModelConfig) -> dict[str, int]:
    """Bytes of each class as stored: the payload of the safetensors files."""
    sizes: dict[str, int] = {}
    for name, shape, storage in tensors(m):
        elements = _product(shape)
        if storage in ("blocks", "absorbed") and m.quantization is not None:
            stored = _block_bytes(shape)
        elif storage == "float32" and m.quantization is not None:
            stored = 4 * elements
        else:
            stored = BYTES[m.dtype] * elements
        sizes[name] = sizes.get(name, 0) + stored
    return sizes


def loaded_bytes(m: ModelConfig, dtype: str, *, keep_fp8: bool = False) -> dict[str, int]:
    """Bytes of each class once loaded: each parameter in `dtype`, FP8 blocks dequantised; with `keep_fp8`, as on a GPU,
    blocks as stored, and norms and biases in float32.
    """
    sizes: dict[str, int] = {}
    for name, shape, storage in tensors(m):
        if keep_fp8 and storage == "blocks" and m.quantization is not None:
            size = _block_bytes(shape)
        else:
            size = (4 if keep_fp8 and storage == "float32" else BYTES[dtype]) * _product(shape)
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def _block_bytes(shape: tuple[int, ...]) -> int:
    return _product(shape) + 4 * -(-shape[0] // 128) * -(-shape[1] // 128)


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def latent_bytes(m: ModelConfig, kv_cache_dtype: str) -> int:
    """Bytes of one token in one layer of the latent cache. fp8: e4m3 latent, an fp32 scale per 128, bf16 rope part."""
    if kv_cache_dtype == "fp8_e4m3":
        return m.kv_lora_rank + 4 * -(-m.kv_lora_rank // 128) + 2 * m.qk_rope_head_dim
    return BYTES[kv_cache_dtype] * (m.kv_lora_rank + m.qk_rope_head_dim)


def index_bytes(m: ModelConfig, index_cache_dtype: str) -> int:
    """Bytes of one token in one layer of the index cache. fp8: e4m3 key and one fp32 scale."""
    if index_cache_dtype == "fp8_e4m3":
        return m.index_head_dim + 4
    return BYTES[index_cache_dtype] * m.index_head_dim


def token_bytes(m: ModelConfig, kv_cache_dtype: str, index_cache_dtype: str) -> int:
    """Bytes of one cached token, all layers."""
    return m.num_hidden_layers * (latent_bytes(m, kv_cache_dtype) + index_bytes(m, index_cache_dtype))


def step_bytes(
    m: ModelConfig, *, tokens: int, rows: int, context: int, dense: int, dtype: str, index_cache_dtype: str
) -> dict[str, int]:
    """The largest buffers of one step, an estimate from above of what is alive at once.

    tokens   in the step       rows   requests that sample
    context  longest request   dense  context up to which prefill expands keys and values of all heads
    """
    size = BYTES[dtype]
    per_head = m.qk_head_dim + 2 * (m.kv_lora_rank + m.qk_rope_head_dim) + m.v_head_dim
    attention = m.num_attention_heads * per_head + m.index_n_heads * m.index_head_dim
    experts = 3 * max(m.intermediate_size, (m.num_experts_per_tok + m.n_shared_experts) * m.moe_intermediate_size)
    routed = m.num_experts_per_tok * m.hidden_size
    expanded = min(dense, context) * m.num_attention_heads * (m.qk_head_dim + m.v_head_dim)
    # the masked attention computes in float32
    expanded_size = size if dtype == "float32" else size + BYTES["float32"]
    return {
        "index logits": min(4 * tokens * context, INDEX_LOGITS) + KERNEL_SCRATCH,
        "index keys": max(KERNEL_SCRATCH, context * index_bytes(m, index_cache_dtype)),
        "selection": SELECTION_COPIES * 8 * tokens * min(m.index_topk, context),
        "activations": size * tokens * (4 * m.hidden_size + max(attention, experts + routed)) + 2 * KERNEL_SCRATCH,
        "expanded prefill": expanded_size * expanded,
        "sampling": 3 * 4 * max(rows * m.vocab_size, min(tokens * m.vocab_size, PROMPT_LOGITS))
        + min(SAMPLER_SCRATCH, 4 * 8 * rows * m.vocab_size),
    }


def gpu_step_bytes(m: ModelConfig, *, rows: int, context: int, vocab_rows: int, fp8_cache: bool) -> dict[str, int]:
    """What a step takes on a GPU besides `step_bytes`.

    rows       requests that sample    context  longest request
    vocab_rows the largest batch in a CUDA graph; 0 without graphs
    """
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    of_row = 3 * m.hidden_size + 6 * m.moe_intermediate_size
    kept = graph_rows(vocab_rows, context, m.index_topk) if vocab_rows else 0
    graphs = (vocab_rows * BYTES["bfloat16"] + kept * BYTES["float32"]) * m.vocab_size
    return {
        "selection on the GPU": GPU_SELECTION_SCRATCH,
        "expert rows": (m.n_routed_experts + m.n_shared_experts) * EXPERT_ROWS * of_row,
        "prefill from the fp8 cache": context * latent * (2 * BYTES["float32"] + BYTES["bfloat16"]) if fp8_cache else 0,
        "CUDA graphs": graphs + 16 * rows * m.num_attention_heads * latent if vocab_rows else 0,
    }


def graph_rows(most: int, context: int, index_topk: int) -> int:
    """Rows of logits in the graphs that are captured at start (`usual_shapes`): each keeps its own. Batches of 1, 2, 4,
    8, 16, 24, ... `most`, and `most` at each doubling of index_topk up to the context.
    """
    sizes = [size for size in (1, 2, 4) if size < most] + [*range(8, most, 8), most]
    contexts = 1
    while index_topk << (contexts - 1) < context:
        contexts += 1
    return sum(sizes) + most * (contexts - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes by class; `available` is the machine's memory now, `budget` the part the engine may use."""

    checkpoint: dict[str, int]
    weights: dict[str, int]
    latent_cache: int
    index_cache: int
    step: dict[str, int]
    token: int
    num_tokens: int
    available: int
    budget: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.latent_cache + self.index_cache + sum(self.step.values())

    def table(self) -> str:
        """Lines for a terminal, GiB."""
        lines = [f"  {name:<28}{_gib(size)}" for name, size in self.weights.items()]
        lines.append(
            f"  {'weights':<28}{_gib(sum(self.weights.values()))}   {_gib(sum(self.checkpoint.values()))} in the files"
        )
        lines.append(
            f"  {'latent cache':<28}{_gib(self.latent_cache)}   {self.num_tokens} tokens of {self.token} bytes"
        )
        lines.append(f"  {'index cache':<28}{_gib(self.index_cache)}")
        lines += [f"  {name:<28}{_gib(size)}" for name, size in self.step.items()]
        lines.append(
            f"  {'total':<28}{_gib(self.total)}   of {_gib(self.budget)} allowed, {_gib(self.available)} available"
        )
        return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:10.3f} GiB"


def plan(config: Config, available: int) -> MemoryPlan:
    """The plan of a resolved configuration. The pool has one page more than its tokens need: page 0 is for padding."""
    m, load, cache = config.model, config.load, config.cache
    slots = cache.max_total_tokens + PAGE_SIZE
    on_gpu = load.device == "cuda"
    rows = config.scheduler.max_running_requests
    step = step_bytes(
        m,
        tokens=config.scheduler.chunked_prefill_size,
        rows=rows,
        context=load.context_length,
        dense=config.attention.dense_prefill_threshold,
        dtype=load.dtype,
        index_cache_dtype=cache.index_cache_dtype,
    )
    if on_gpu:
        in_graphs = min(rows, config.scheduler.cuda_graph_max_bs or rows)
        step |= gpu_step_bytes(
            m,
            rows=rows,
            context=load.context_length,
            vocab_rows=0 if config.scheduler.disable_cuda_graph else in_graphs,
            fp8_cache=cache.kv_cache_dtype == "fp8_e4m3",
        )
    return MemoryPlan(
        checkpoint=checkpoint_bytes(m),
        weights=loaded_bytes(m, load.dtype, keep_fp8=on_gpu),
        latent_cache=slots * m.num_hidden_layers * latent_bytes(m, cache.kv_cache_dtype),
        index_cache=slots * m.num_hidden_layers * index_bytes(m, cache.index_cache_dtype),
        step=step,
        token=token_bytes(m, cache.kv_cache_dtype, cache.index_cache_dtype),
        num_tokens=cache.max_total_tokens,
        available=available,
        budget=int(available * cache.mem_fraction_static),
    )
