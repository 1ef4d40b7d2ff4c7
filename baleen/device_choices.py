"""What the open choices become on a CPU and on a GPU: cache layout, kernels, sizes of a step, CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baleen.config import AUTO, FASTEST, PAGE_SIZE, ModelConfig
from baleen.resolver import Resolver

HOPPER = "Hopper (compute capability 9.0)"
E4M3 = 89  # capability whose GPUs convert it
# Context up to which a GPU's prefill chunk is multi-head attention under the mask.
MASKED_PREFILL = 8192


@dataclass(frozen=True, slots=True)
class Library:
    """Kernels that may be installed.

    module        what is imported                 install  how it comes there
    capabilities  of its GPUs; empty: AMD's GPUs    where    the same in words
    """

    module: str
    install: str
    capabilities: Sequence[int]
    where: str


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention backend: its library, and the layouts of the KV cache that it reads in each phase."""

    library: Library
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


DEEP_GEMM = Library("deep_gemm", "pip install sgl-deep-gemm", (90,), HOPPER)
FLASH_MLA = Library("flash_mla", "pip install sgl-flash-mla", (90,), HOPPER)
FLASH_ATTENTION = Library("flash_attn_interface", "build FlashAttention's folder hopper", (90,), HOPPER)
TILELANG = Library("tilelang", "pip install tilelang", (80, 90, 100, 103), "compute capability 8.0, 9.0 and 10.0")
FLASHINFER = Library("flashinfer", "pip install flashinfer-python", (100, 103), "Blackwell (compute capability 10.0)")
AITER = Library("aiter", "pip install amd-aiter", (), "AMD's GPUs")
TRITON = Library("triton", "pip install triton", range(80, 200), "compute capability 8.0 and newer")

BF16, FP8 = "bfloat16", "fp8_e4m3"
BACKENDS = {
    "flashmla_sparse": Backend(FLASH_MLA, (BF16, FP8), (BF16,)),
    "flashmla_kv": Backend(FLASH_MLA, (FP8,), (FP8,)),
    "triton": Backend(TRITON, (BF16, FP8), (BF16, FP8)),
    "fa3": Backend(FLASH_ATTENTION, (BF16, FP8), (BF16,)),
    "tilelang": Backend(TILELANG, (BF16, FP8), (BF16,)),
    "trtllm": Backend(FLASHINFER, (BF16,), (BF16,)),
    "aiter": Backend(AITER, (BF16, FP8), (BF16,)),
}
UNTRIED = ("trtllm", "aiter")
PHASES = {"attention.prefill_backend": "prefill", "attention.decode_backend": "decode"}


def on_gpu(r: Resolver) -> bool:
    return bool(r["load.device"] == "cuda")


def device(r: Resolver) -> None:
    """Where the model runs, and in what."""
    found = r.hardware.device == "cuda"
    r.choose("load.device", r.hardware.device, "a GPU is present" if found else "no GPU found")
    if on_gpu(r) and not found:
        r.refusals.append(f"{r.given['load.device'].spelling} cuda: no GPU found; give cpu, or leave it out")
    if on_gpu(r):
        r.choose("load.dtype", "bfloat16", "what a GPU's kernels compute in")
    r.choose("load.dtype", "float32", "a CPU emulates bfloat16, 3 to 5 times slower")


def round_up(value: int) -> int:
    return -(-value // PAGE_SIZE) * PAGE_SIZE


def cache(r: Resolver, model: ModelConfig) -> None:
    """Layout of the KV cache."""
    if r["cache.page_size"] != PAGE_SIZE:
        r.warnings.append(
            f"{r.given['cache.page_size'].spelling} {r['cache.page_size']}: the index layout has pages of 64; using 64"
        )
        r.values["cache.page_size"] = PAGE_SIZE
    if on_gpu(r):
        r.choose("cache.kv_cache_dtype", r["load.dtype"], "as computed; fp8_e4m3 holds more tokens, approximately")
        r.choose("cache.mem_fraction_static", 0.85, "the rest is for CUDA itself and its libraries")
    r.choose("cache.kv_cache_dtype", "float32", "exact, and what a CPU computes in")
    if model.quantization is None:
        r.choose("cache.index_cache_dtype", "float32", "the checkpoint is not quantised: the selection is exact")
    r.choose("cache.index_cache_dtype", "fp8_e4m3", "the checkpoint is FP8: selects as the released model does")
    if r["cache.kv_cache_dtype"] == "fp8_e4m3" and model.kv_lora_rank % 128:
        problem = f"fp8_e4m3 scales blocks of 128, and this model's kv_lora_rank is {model.kv_lora_rank}"
        raise r.error("cache.kv_cache_dtype", problem, "choose float32 or bfloat16")
    if r["cache.index_cache_dtype"] == "fp8_e4m3" and model.index_head_dim > 128:
        problem = (
            f"fp8_e4m3 has one scale for up to 128 values, and this model's index_head_dim is {model.index_head_dim}"
        )
        raise r.error("cache.index_cache_dtype", problem, "choose float32")
    r.choose("cache.mem_fraction_static", 0.5, "on a CPU, half of the available memory; the rest is the system's")


def attention(r: Resolver, model: ModelConfig) -> None:
    """The kernels."""
    r.choose("attention.attention_backend", "dsa", "the model has an indexer (index_topk)")
    for key in PHASES:
        _backend(r, key, model)
    for key in ("kernels", "topk_backend", "moe_runner_backend"):
        if on_gpu(r) and r.hardware.is_amd:
            r.choose(f"attention.{key}", "reference", "plain torch: the faster ones are for NVIDIA's GPUs")
        if on_gpu(r):
            r.choose(f"attention.{key}", FASTEST, "of each operation the first implementation that can be imported")
        r.choose(f"attention.{key}", "reference", "plain torch, the one for a CPU")
        if r[f"attention.{key}"] not in ("reference", FASTEST):
            asked = r.given[f"attention.{key}"]
            lacks = _library_problem(r, DEEP_GEMM)
            if lacks and asked.value == "deep_gemm":
                r.refusals.append(f"{asked.spelling} deep_gemm: {lacks}")
    dense = "attention.dense_prefill_threshold"
    if r["attention.prefill_backend"] != "reference":
        r.choose(dense, MASKED_PREFILL, "masked multi-head prefill is faster up to here, measured on an H200")
    # Measured with keys and values of 192 and 128, the released model's, and of 128 and 64.
    times = 4 if model.qk_head_dim + model.v_head_dim > 192 else 6
    r.choose(dense, times * model.index_topk, f"{times} index_topk: masked multi-head prefill is faster up to here")


def _backend(r: Resolver, key: str, model: ModelConfig) -> None:
    cache = r["cache.kv_cache_dtype"]
    if r[key] == "flashmla_auto" and PHASES[key] == "prefill":
        r.values[key] = "flashmla_kv" if cache == "fp8_e4m3" else "flashmla_sparse"
        r.reasons[key] = f"flashmla_auto, with a {cache} cache"
    if key in r.given and not r.is_auto(key):
        asked = f"{r.given[key].spelling} {r.given[key].value}"
        if problem := _backend_problem(r, key, r[key], model):
            others = [name for name in BACKENDS if name not in UNTRIED and not _backend_problem(r, key, name, model)]
            run = f"{', '.join(others)} and reference run here" if others else "reference runs here"
            r.refusals.append(f"{asked}: {problem}; {run}")
        elif r[key] in UNTRIED:
            r.warnings.append(f"{asked}: written to its library's documentation, and never run by baleen's authors")
        return
    if not on_gpu(r):
        r.choose(key, "reference", "plain torch, the one for a CPU")
        return
    lacks = _backend_problem(r, key, "flashmla_sparse", model)
    for name, reason in (
        ("flashmla_sparse", f"FlashMLA, reads the {cache} cache"),
        ("flashmla_kv", f"FlashMLA, reads the {cache} cache"),
        ("triton", f"baleen's own kernels: FlashMLA {lacks}"),
    ):
        if not _backend_problem(r, key, name, model):
            r.choose(key, name, reason)
            return
    r.warnings.append(f"{key.split('.')[1]}: reference, plain torch and slow: FlashMLA {lacks}")
    r.choose(key, "reference", f"FlashMLA {lacks}")


def _backend_problem(r: Resolver, key: str, name: str, model: ModelConfig) -> str:
    """Why a backend cannot run in this phase, with what would help; "" if it can."""
    backend = BACKENDS.get(name)
    if backend is None:  # the reference, or a name that is refused already
        return ""
    if lacks := _library_problem(r, backend.library):
        return lacks
    if name == "triton" and r["attention.kernels"] == "reference":
        return "is baleen's own kernels, which --kernels reference turns off"
    dims = (model.kv_lora_rank, model.qk_rope_head_dim)
    if name != "triton" and (dims != (512, 64) or model.num_attention_heads > 128):
        return "takes latents of 512 + 64 and up to 128 heads"
    if name == "trtllm" and model.qk_nope_head_dim != 128:
        return "takes heads of 128 without the rope part"
    if r["load.dtype"] != "bfloat16":
        return "computes in bfloat16: add --dtype bfloat16"
    reads = getattr(backend, PHASES[key])
    if r["cache.kv_cache_dtype"] not in reads:
        return f"reads a cache in {' or '.join(reads)}: add --kv-cache-dtype {reads[0]}"
    if name == "triton" and r["cache.kv_cache_dtype"] == "fp8_e4m3" and r.hardware.capability < E4M3:
        return "reads fp8_e4m3 from compute capability 8.9 on: add --kv-cache-dtype bfloat16"
    return ""


def _library_problem(r: Resolver, library: Library) -> str:
    """Why this library's kernels cannot run; "" if they can."""
    if not on_gpu(r):
        return "runs on a GPU"
    if r.hardware.is_amd != (not library.capabilities):
        return f"runs on {library.where}, and this GPU is {'AMD' if r.hardware.is_amd else 'NVIDIA'}'s"
    if library.capabilities and r.hardware.capability not in library.capabilities:
        return f"runs on {library.where}, and this GPU has {r.hardware.capability / 10}"
    if library.module not in r.hardware.libraries:
        return f"is not installed ({library.install})"
    return ""


def graphs(r: Resolver, model: ModelConfig) -> None:
    """CUDA graphs need kernels that never wait for the GPU, in every operation of a decode step."""
    disable = "scheduler.disable_cuda_graph"
    if not on_gpu(r):
        for key in (disable, "scheduler.cuda_graph_max_bs"):
            if key in r.given:
                r.warnings.append(f"{r.given[key].spelling}: no effect, a CPU has no CUDA graphs")
        return
    lacking = {
        "another decode backend than reference": r["attention.decode_backend"] != "reference",
        "--kernels fastest": r["attention.kernels"] == FASTEST,
        "fastest as top-k and expert kernels": "reference"
        not in (r["attention.topk_backend"], r["attention.moe_runner_backend"]),
        "deep_gemm (pip install sgl-deep-gemm)": not _library_problem(r, DEEP_GEMM),
        "an FP8 checkpoint": model.quantization is not None,
        "experts of whole FP8 blocks": not model.moe_intermediate_size % 128 and not model.hidden_size % 128,
        "an fp8_e4m3 index cache": r["cache.index_cache_dtype"] == "fp8_e4m3",
    }
    missing = [what for what, there in lacking.items() if not there]
    if missing and not r[disable]:
        r.values[disable] = True
        r.reasons[disable] = f"CUDA graphs need {missing[0]}"
        r.warnings.append(f"decode runs without CUDA graphs, slower: they need {', '.join(missing)}")


def sizes(r: Resolver) -> None:
    """Requests and tokens of one step, and which requests."""
    if r["scheduler.schedule_policy"] == "priority":
        r.values["scheduler.enable_priority_scheduling"] = True
    low_first = "scheduler.schedule_low_priority_values_first"
    if r[low_first] and not r["scheduler.enable_priority_scheduling"]:
        r.refusals.append(f"{r.given[low_first].spelling}: priorities are off; add --enable-priority-scheduling")
    chunk_key, running_key = "scheduler.chunked_prefill_size", "scheduler.max_running_requests"
    chunk = r[chunk_key]
    if chunk == -1:
        r.values[chunk_key] = chunk = round_up(r["load.context_length"] + PAGE_SIZE)
        r.reasons[chunk_key] = "-1: a whole prompt of the longest context fits in one step"
    if chunk != AUTO and (chunk <= 0 or chunk % PAGE_SIZE):
        raise r.error(
            chunk_key, f"{chunk} is not a positive multiple of {PAGE_SIZE}", "write e.g. 512, or -1 for whole prompts"
        )
    where, most, usual = ("GPU", 128, 8192) if on_gpu(r) else ("CPU", 64, 512)
    if chunk != AUTO:
        most = min(most, chunk // 2)
    r.choose(running_key, most, f"{most} on a {where}, and at most half of --chunked-prefill-size")
    running = r[running_key]
    reason = f"{usual} on a {where}, and room beside a token of each request"
    r.choose(chunk_key, max(usual, round_up(running + PAGE_SIZE)), reason)
    if r[chunk_key] <= running:
        problem = f"{r[chunk_key]} leaves no token for a prompt beside {running} running requests"
        raise r.error(chunk_key, problem, f"write at least {round_up(running + 1)}, or lower --max-running-requests")
