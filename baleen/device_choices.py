"""What the open choices become on a CPU and on a GPU: cache layout, kernels, sizes of a step, CUDA graphs."""

from __future__ import annotations

from baleen.config import AUTO, FASTEST, PAGE_SIZE, ModelConfig
from baleen.resolver import Resolver

HOPPER = 90


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
    problem = _flashmla_problem(r, model)
    for key, is_prefill in (("attention.prefill_backend", True), ("attention.decode_backend", False)):
        _backend(r, key, problem, is_prefill=is_prefill)
    for key in ("kernels", "topk_backend", "moe_runner_backend"):
        if on_gpu(r):
            r.choose(f"attention.{key}", FASTEST, "of each operation the first implementation that can be imported")
        r.choose(f"attention.{key}", "reference", "plain torch, the one for a CPU")
        if r[f"attention.{key}"] not in ("reference", FASTEST):
            asked = r.given[f"attention.{key}"]
            lacks = _library_problem(r, "deep_gemm")
            if lacks and asked.value == "deep_gemm":
                r.refusals.append(f"{asked.spelling} deep_gemm: {lacks}")
    dense = "attention.dense_prefill_threshold"
    if r["attention.prefill_backend"] != "reference":
        if not r.is_auto(dense) and r[dense]:
            r.warnings.append(
                f"{r.given[dense].spelling}: no effect, {r['attention.prefill_backend']} is sparse throughout"
            )
        r.values[dense] = AUTO
        r.choose(dense, 0, f"{r['attention.prefill_backend']} is sparse throughout")
    r.choose(dense, 4 * model.index_topk, "4 index_topk: masked multi-head prefill is faster up to here")


def _backend(r: Resolver, key: str, problem: str, *, is_prefill: bool) -> None:
    fp8 = r["cache.kv_cache_dtype"] == "fp8_e4m3"
    if r[key] == "flashmla_auto":
        r.values[key] = "flashmla_kv" if fp8 else "flashmla_sparse"
        r.reasons[key] = f"flashmla_auto, with a {r['cache.kv_cache_dtype']} cache"
    if r.is_auto(key) and on_gpu(r) and not problem:
        reads = f"reads the {r['cache.kv_cache_dtype']} cache"
        r.choose(key, "flashmla_sparse" if is_prefill or not fp8 else "flashmla_kv", f"FlashMLA, {reads}")
    elif r.is_auto(key) and on_gpu(r):
        r.warnings.append(f"{key.split('.')[1]}: reference, plain torch and slow: FlashMLA {problem}")
    r.choose(key, "reference", "plain torch, the one for a CPU" if not on_gpu(r) else f"FlashMLA {problem}")
    if not r[key].startswith("flashmla") or key not in r.given:
        return
    asked = f"{r.given[key].spelling} {r.given[key].value}"
    if problem:
        r.refusals.append(f"{asked}: {problem}; reference runs here")
    elif r[key] == "flashmla_kv" and not fp8:
        r.refusals.append(f"{asked}: reads an fp8_e4m3 cache; add --kv-cache-dtype fp8_e4m3, or use flashmla_sparse")
    elif r[key] == "flashmla_sparse" and fp8 and not is_prefill:
        r.refusals.append(f"{asked}: reads a bfloat16 cache; use flashmla_kv with fp8_e4m3")


def _library_problem(r: Resolver, library: str) -> str:
    """Why this library's kernels cannot run; "" if they can."""
    if not on_gpu(r):
        return "runs on a GPU"
    if r.hardware.capability != HOPPER:
        return f"runs on Hopper (compute capability 9.0), and this GPU has {r.hardware.capability / 10}"
    if library not in r.hardware.libraries:
        return f"is not installed (pip install sgl-{library.replace('_', '-')})"
    return ""


def _flashmla_problem(r: Resolver, model: ModelConfig) -> str:
    if lacks := _library_problem(r, "flash_mla"):
        return lacks
    if (model.kv_lora_rank, model.qk_rope_head_dim) != (512, 64) or model.num_attention_heads > 128:
        return "takes latents of 512 + 64 and up to 128 heads"
    if r["load.dtype"] != "bfloat16" or r["cache.kv_cache_dtype"] not in ("bfloat16", "fp8_e4m3"):
        return "computes in bfloat16, from a bfloat16 or fp8_e4m3 cache"
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
        "a FlashMLA decode backend": r["attention.decode_backend"] != "reference",
        "--kernels fastest": r["attention.kernels"] == FASTEST,
        "fastest as top-k and expert kernels": "reference"
        not in (r["attention.topk_backend"], r["attention.moe_runner_backend"]),
        "deep_gemm (pip install sgl-deep-gemm)": not _library_problem(r, "deep_gemm"),
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
