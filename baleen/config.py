"""Every setting of the engine, as frozen dataclasses: the model (from config.json) and one section per concern (flags).

A section's field is made by `opt`, which carries all there is to know about its flag: spellings (SGLang's current one
first), help, bounds, and whether the engine can do it yet. `baleen.flags` turns these into a parser and resolves every
`AUTO`; a field whose default is `AUTO` has no dataclass default, so a section cannot be built with an undecided value.

To add a setting: one field with `opt`, its use, and its spelling in the frozen list of `tests/test_seed_commands.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from baleen.model_config import PUBLISHED, BlockFp8, ConfigError, ModelConfig, RopeScaling

__all__ = [
    "AUTO",
    "FASTEST",
    "PAGE_SIZE",
    "PUBLISHED",
    "SECTIONS",
    "AttentionConfig",
    "BlockFp8",
    "CacheConfig",
    "Config",
    "ConfigError",
    "DisaggregationConfig",
    "LoadConfig",
    "ModelConfig",
    "ParallelConfig",
    "RopeScaling",
    "SchedulerConfig",
    "ServerConfig",
    "SpeculativeConfig",
    "opt",
]

AUTO = "auto"
FASTEST = "fastest"
PAGE_SIZE = 64


def opt(
    default: Any,
    *flags: str,
    help: str,
    old: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    synonyms: Mapping[str, str] | None = None,
    least: float | None = None,
    most: float | None = None,
    built: tuple[Any, ...] = (),
    needs: str = "",
    no_effect: str = "",
    note: str = "",
    secret: bool = False,
) -> Any:
    """Declare one setting.

    flags       spellings, the current one first       old       spellings that still work, with a warning
    choices     the only values                        synonyms  other spelling of a value -> the value
    least most  inclusive bounds of a number           secret    never printed
    built       with `needs`: the values that work, besides the default; any other is refused with `needs`
    no_effect   given: accepted, with this warning     note      given: accepted, and this is the reason shown
    """
    metadata = {
        "default": default, "flags": flags, "old": old, "help": help, "choices": choices, "synonyms": synonyms or {},
        "least": least, "most": most, "built": built, "needs": needs, "no_effect": no_effect, "note": note,
        "secret": secret,
    }  # fmt: skip
    return field(default=MISSING if default == AUTO else default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """The model and how it is loaded."""

    model_path: str = opt(AUTO, "--model-path", "--model", help="checkpoint folder, or a hub name in the local cache")
    tokenizer_path: str = opt(AUTO, "--tokenizer-path", help="folder with tokenizer.json; auto: the checkpoint's")
    revision: str = opt("main", "--revision", help="revision of a hub name in the local cache")
    load_format: str = opt(
        AUTO, "--load-format", choices=(AUTO, "safetensors", "dummy"), help="dummy: random weights, nothing is read"
    )
    dtype: str = opt(
        AUTO,
        "--dtype",
        choices=(AUTO, "float32", "bfloat16"),
        synonyms={"float": "float32", "bf16": "bfloat16"},
        help="weights and activations as computed",
    )
    quantization: str = opt(AUTO, "--quantization", help="must be the checkpoint's own: fp8 or none")
    device: str = opt(
        AUTO,
        "--device",
        choices=(AUTO, "cpu", "cuda"),
        help="where the model runs; auto: the GPU if there is one",
    )
    context_length: int = opt(
        AUTO, "--context-length", least=1, help="longest request, prompt and reply (accepts 128k)"
    )
    random_seed: int = opt(
        AUTO,
        "--random-seed",
        least=0,
        most=2**63 - 1,
        help="seeds sampling of requests without a seed, and dummy weights",
    )
    json_model_override_args: str = opt("{}", "--json-model-override-args", help="JSON merged into config.json")
    trust_remote_code: bool = opt(
        False, "--trust-remote-code", no_effect="baleen runs no code from checkpoints", help="accepted, without effect"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The KV cache."""

    page_size: int = opt(PAGE_SIZE, "--page-size", least=1, help="tokens per page; always 64")
    kv_cache_dtype: str = opt(
        AUTO,
        "--kv-cache-dtype",
        choices=(AUTO, "float32", "bfloat16", "fp8_e4m3"),
        synonyms={"bf16": "bfloat16"},
        help="latent KV; fp8_e4m3 is approximate",
    )
    index_cache_dtype: str = opt(
        AUTO,
        "--index-cache-dtype",
        choices=(AUTO, "float32", "fp8_e4m3"),
        help="keys of the indexer; fp8_e4m3 is how the released model runs",
    )
    max_total_tokens: int = opt(
        AUTO, "--max-total-tokens", least=PAGE_SIZE, help="tokens in the cache, all requests together"
    )
    mem_fraction_static: float = opt(
        AUTO, "--mem-fraction-static", least=0.01, most=0.99, help="share of the available memory for weights and cache"
    )
    disable_radix_cache: bool = opt(False, "--disable-radix-cache", help="share no prefix between requests")
    radix_eviction_policy: str = opt(
        "lru",
        "--radix-eviction-policy",
        choices=("lru", "lfu", "slru", "priority"),
        built=("lru",),
        needs="another eviction policy than lru",
        help="which cached prefix goes first",
    )
    enable_hierarchical_cache: bool = opt(
        False, "--enable-hierarchical-cache", needs="a cache tier in host memory (HiCache)", help="host memory tier"
    )
    enable_hisparse: bool = opt(
        False,
        "--enable-hisparse",
        needs="a KV cache in host memory (HiSparse)",
        help="KV in host memory, selection on the device",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Who runs next."""

    max_running_requests: int = opt(AUTO, "--max-running-requests", least=1, help="requests in one step")
    max_queued_requests: int | None = opt(
        None, "--max-queued-requests", least=1, help="more waiting are refused with 503"
    )
    chunked_prefill_size: int = opt(
        AUTO,
        "--chunked-prefill-size",
        help="tokens in one step, all rows together, a multiple of 64; -1: whole prompts",
    )
    schedule_policy: str = opt(
        "fcfs",
        "--schedule-policy",
        choices=("fcfs", "lpm", "random", "dfs-weight", "lof", "priority", "routing-key"),
        built=("lpm", "priority"),
        needs="another policy than fcfs, lpm and priority",
        help="order of waiting requests; lpm: longest cached prefix first; priority: fcfs with"
        " --enable-priority-scheduling",
    )
    enable_priority_scheduling: bool = opt(
        False,
        "--enable-priority-scheduling",
        help="waiting requests of larger `priority` go first, those of the smallest are retracted first; nothing that"
        " runs is stopped for one that waits",
    )
    schedule_low_priority_values_first: bool = opt(
        False, "--schedule-low-priority-values-first", help="smaller `priority` goes first"
    )
    request_waiting_timeout: float = opt(
        -1.0,
        "--request-waiting-timeout",
        least=-1.0,
        help="seconds in the queue, then the request ends with 503; 0 or less: no limit",
    )
    request_running_timeout: float = opt(
        -1.0,
        "--request-running-timeout",
        least=-1.0,
        help="seconds from the start of its prompt, then a request ends with finish_reason abort and its output so far;"
        " 0 or less: no limit",
    )
    schedule_conservativeness: float = opt(
        1.0, "--schedule-conservativeness", least=0.01, most=100.0, help="higher: admit less, retract less"
    )
    enable_mixed_chunk: bool = opt(
        False,
        "--enable-mixed-chunk",
        note="prefill and decode always share a step when they fit",
        help="accepted; always so",
    )
    disable_overlap_schedule: bool = opt(
        False, "--disable-overlap-schedule", help="schedule a step only after the one before has ended"
    )
    watchdog_timeout: float | None = opt(
        None,
        "--watchdog-timeout",
        least=0.001,
        needs="a watchdog that ends a hung engine",
        help="seconds without a step",
    )
    cuda_graph_max_bs: int | None = opt(
        None,
        "--cuda-graph-max-bs-decode",
        old=("--cuda-graph-max-bs",),
        least=1,
        help="largest decode batch in a CUDA graph; default: --max-running-requests",
    )
    disable_cuda_graph: bool = opt(False, "--disable-cuda-graph", help="run without CUDA graphs")
    skip_server_warmup: bool = opt(
        False, "--skip-server-warmup", help="on a GPU, compile kernels when requests first need them, not at start"
    )


_DSA_BACKENDS = (
    AUTO, "reference", "flashmla_sparse", "flashmla_sparse_q8", "flashmla_kv", "flashmla_auto", "fa3", "tilelang",
    "aiter", "trtllm", "triton",
)  # fmt: skip
_DSA_BUILT = ("reference", "flashmla_sparse", "flashmla_kv", "fa3", "tilelang", "aiter", "trtllm", "triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Attention and kernels."""

    attention_backend: str = opt(
        AUTO,
        "--attention-backend",
        synonyms={"nsa": "dsa"},
        built=("dsa",),
        needs="another attention backend than dsa",
        help="dsa",
    )
    prefill_backend: str = opt(
        AUTO,
        "--dsa-prefill-backend",
        old=("--nsa-prefill-backend", "--nsa-prefill"),
        choices=_DSA_BACKENDS,
        built=(*_DSA_BUILT, "flashmla_auto"),
        needs="queries in FP8",
        help="sparse attention of prefill tokens",
    )
    decode_backend: str = opt(
        AUTO,
        "--dsa-decode-backend",
        old=("--nsa-decode-backend", "--nsa-decode"),
        choices=_DSA_BACKENDS,
        built=_DSA_BUILT,
        needs="a decode kernel of this name",
        help="sparse attention of decode tokens",
    )
    topk_backend: str = opt(
        AUTO,
        "--dsa-topk-backend",
        choices=(AUTO, "reference", FASTEST, "sgl-kernel", "flashinfer"),
        synonyms={"torch": "reference"},
        built=("reference", FASTEST),
        needs="the top-k kernel of another library",
        help="selection of the best-scored tokens",
    )
    moe_runner_backend: str = opt(
        AUTO,
        "--moe-runner-backend",
        built=("reference", FASTEST, "deep_gemm"),
        needs="another expert kernel than reference and deep_gemm",
        help="matrix products of the routed experts",
    )
    kernels: str = opt(
        AUTO,
        "--kernels",
        choices=(AUTO, "reference", FASTEST),
        help="reference: every operation in plain torch; fastest: on a GPU the first of each that can be imported",
    )
    dense_prefill_threshold: int = opt(
        AUTO,
        "--dense-prefill-threshold",
        least=0,
        help="up to this context, prefill is full attention masked by the selection: same result, faster when short",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Several ranks."""

    tp_size: int = opt(
        1, "--tp-size", "--tensor-parallel-size", "--tp", least=1, needs="tensor parallelism", help="ranks"
    )
    pp_size: int = opt(
        1, "--pp-size", "--pipeline-parallel-size", "--pp", least=1, needs="pipeline parallelism", help="stages"
    )
    pp_layer_partition: str | None = opt(
        None, needs="pipeline parallelism", help="layers of each stage (SGLANG_PP_LAYER_PARTITION)"
    )
    dp_size: int = opt(
        1, "--dp-size", "--data-parallel-size", "--dp", least=1, needs="data parallelism", help="replicas"
    )
    enable_dp_attention: bool = opt(
        False, "--enable-dp-attention", needs="data parallelism", help="data-parallel attention, experts over all ranks"
    )
    ep_size: int = opt(
        1,
        "--ep-size",
        "--expert-parallel-size",
        "--ep",
        least=1,
        needs="expert parallelism",
        help="ranks of the experts",
    )
    moe_dense_tp_size: int = opt(
        1, "--moe-dense-tp-size", least=1, needs="tensor parallelism", help="ranks of the dense layers' MLP"
    )
    attn_cp_size: int = opt(
        1,
        "--attn-cp-size",
        "--attention-context-parallel-size",
        least=1,
        needs="context parallelism",
        help="ranks of a prompt",
    )
    enable_prefill_cp: bool = opt(
        False,
        "--enable-prefill-cp",
        old=("--enable-dsa-prefill-context-parallel", "--enable-nsa-prefill-context-parallel"),
        needs="context parallelism",
        help="split long prompts over ranks",
    )
    cp_strategy: str | None = opt(
        None,
        "--cp-strategy",
        old=("--dsa-prefill-cp-mode", "--nsa-prefill-cp-mode"),
        choices=("zigzag", "interleave"),
        synonyms={"in-seq-split": "zigzag", "round-robin-split": "interleave"},
        needs="context parallelism",
        help="how a prompt is split",
    )
    nnodes: int = opt(1, "--nnodes", least=1, needs="several nodes", help="machines")
    node_rank: int = opt(0, "--node-rank", least=0, needs="several nodes", help="this machine")
    dist_init_addr: str | None = opt(
        None, "--dist-init-addr", "--nccl-init-addr", needs="several ranks", help="host:port where ranks meet"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """Multi-token prediction."""

    algorithm: str | None = opt(
        None,
        "--speculative-algorithm",
        choices=("EAGLE", "NEXTN"),
        needs="multi-token prediction",
        help="draft with the MTP layer",
    )
    num_steps: int | None = opt(
        None, "--speculative-num-steps", least=1, needs="multi-token prediction", help="draft steps"
    )
    eagle_topk: int | None = opt(
        None, "--speculative-eagle-topk", least=1, most=1, needs="multi-token prediction", help="1: a chain"
    )
    num_draft_tokens: int | None = opt(
        None, "--speculative-num-draft-tokens", least=1, needs="multi-token prediction", help="tokens verified at once"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DisaggregationConfig:
    """Prefill and decode in different servers."""

    mode: str = opt(
        "null",
        "--disaggregation-mode",
        choices=("null", "prefill", "decode"),
        needs="prefill/decode disaggregation",
        help="role of this server",
    )
    bootstrap_port: int | None = opt(
        None,
        "--disaggregation-bootstrap-port",
        least=1,
        most=65535,
        needs="prefill/decode disaggregation",
        help="where decode servers ask",
    )
    ib_device: str | None = opt(
        None,
        "--disaggregation-ib-device",
        needs="prefill/decode disaggregation",
        help="InfiniBand devices, comma-separated",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """HTTP."""

    host: str = opt("127.0.0.1", "--host", help="address to listen on")
    port: int = opt(30000, "--port", least=1, most=65535, help="port to listen on")
    served_model_name: str = opt(
        AUTO, "--served-model-name", help="the model's name in the API; auto: as given to --model"
    )
    api_key: str | None = opt(
        None, "--api-key", secret=True, help="requests must carry it; /health and /metrics are open to all"
    )
    max_request_body_size: int = opt(
        64 * 2**20, "--max-request-body-size", least=1, help="bytes of a request's body (accepts 64M); 413 above"
    )
    log_level: str = opt(
        "info",
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="debug shows each HTTP request; warning and error, less than info",
    )
    tokenizer_worker_num: int = opt(
        1, "--tokenizer-worker-num", least=1, most=64, help="processes that share HTTP, tokenization and text"
    )
    enable_metrics: bool = opt(
        False, "--enable-metrics", note="/metrics is always on", help="accepted; /metrics is always on"
    )
    collect_tokens_histogram: bool = opt(
        False, "--collect-tokens-histogram", no_effect="SGLang has deprecated it too", help="accepted, without effect"
    )
    tool_call_parser: str = opt(
        AUTO,
        "--tool-call-parser",
        choices=(AUTO, "deepseekv32", "deepseekv31", "none"),
        synonyms={"deepseek_v32": "deepseekv32", "deepseek_v31": "deepseekv31"},
        help="format of tool calls; auto: the chat template's",
    )
    reasoning_parser: str = opt(
        AUTO,
        "--reasoning-parser",
        choices=(AUTO, "deepseek-v3", "none"),
        synonyms={"deepseek_v3": "deepseek-v3", "deepseek-v3.2": "deepseek-v3", "deepseek_v32": "deepseek-v3"},
        help="how reasoning is told from content; none: it is left in the content",
    )
    chat_template: str = opt(
        AUTO,
        "--chat-template",
        help="Jinja file, checkpoint (its own template), or a built-in format: deepseekv32, deepseekv32-speciale, "
        "deepseekv31 (V3.1, V3.2-Exp)",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What one engine and server run with; nothing changes it.

    model_path  the checkpoint's folder; "" when nothing is read (a dry run by published numbers)
    """

    model_path: str
    model: ModelConfig
    load: LoadConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    attention: AttentionConfig
    parallel: ParallelConfig
    speculative: SpeculativeConfig
    disaggregation: DisaggregationConfig
    server: ServerConfig


SECTIONS: dict[str, type] = {
    "load": LoadConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "attention": AttentionConfig,
    "parallel": ParallelConfig,
    "speculative": SpeculativeConfig,
    "disaggregation": DisaggregationConfig,
    "server": ServerConfig,
}
