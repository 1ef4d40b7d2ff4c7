"""The launch lines that users of SGLang run for this family parse and resolve; what is not built is refused by name.

Also the frozen list of flag spellings: a change of it is made here too, on purpose.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from baleen import flags
from baleen.__main__ import command
from baleen.config import AUTO
from baleen.flags import Hardware, Resolution
from baleen.resolver import settings

# Large enough for the dequantised weights, so that only what is not built is refused.
MACHINE = Hardware("cpu", 8 * 1024**4, 64)
EXP, V32 = "deepseek-ai/DeepSeek-V3.2-Exp", "deepseek-ai/DeepSeek-V3.2"
SPECIALE, NVFP4 = "deepseek-ai/DeepSeek-V3.2-Speciale", "nvidia/DeepSeek-V3.2-NVFP4"

TP = "needs tensor parallelism, not built yet"
DP = "needs data parallelism, not built yet"
EP = "needs expert parallelism, not built yet"
PP = "needs pipeline parallelism, not built yet"
CP = "needs context parallelism, not built yet"
NODES = "needs several nodes, not built yet"
RANKS = "needs several ranks, not built yet"
MTP = "needs multi-token prediction, not built yet"
PD = "needs prefill/decode disaggregation, not built yet"
ATTENTION = "needs another attention backend than dsa, not built yet"
GPU = "runs on a GPU; reference runs here"
EXPERTS = "needs another expert kernel than reference and deep_gemm, not built yet"
NO_FILE = "there is no such file; the same format is built in: --chat-template deepseekv31"
WATCHDOG = "needs a watchdog that ends a hung engine, not built yet"

EAGLE = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4"
)
EAGLE_REFUSED = (
    "--speculative-algorithm EAGLE, --speculative-num-steps 3, --speculative-eagle-topk 1, "
    f"--speculative-num-draft-tokens 4: {MTP}"
)
DP8 = f"--dp 8, --enable-dp-attention: {DP}"
DP8_SIZE = f"--dp-size 8, --enable-dp-attention: {DP}"
NSA_CP = "--enable-nsa-prefill-context-parallel"
AMD = (
    "SGLANG_NSA_FUSE_TOPK=false SGLANG_NSA_KV_CACHE_STORE_FP8=false SGLANG_NSA_USE_REAL_INDEXER=true "
    "SGLANG_NSA_USE_TILELANG_PREFILL=True"
)
PIPELINE = (
    "--nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1:62001 --tp 8 --pp-size 2 --dp-size 1 --moe-dense-tp-size 1 "
    f"{NSA_CP} --attn-cp-size 8 --nsa-prefill-cp-mode round-robin-split"
)
PIPELINE_REFUSED = {
    f"--nnodes 2: {NODES}",
    f"--dist-init-addr 10.0.0.1:62001: {RANKS}",
    f"--tp 8: {TP}",
    f"{NSA_CP}, --attn-cp-size 8, --nsa-prefill-cp-mode round-robin-split: {CP}",
}

# (the line after `python -m baleen.launch_server`, variables before it, and exactly what is refused)
LINES: list[tuple[str, str, set[str]]] = [
    ("", f"--model {EXP} --tp 8 --dp 8 --enable-dp-attention", {f"--tp 8: {TP}", DP8}),
    (
        "",
        f"--model {EXP} --tp 8 --ep 8 --dp 8 --enable-dp-attention",
        {f"--tp 8: {TP}", f"--ep 8: {EP}", DP8},
    ),
    ("", f"--model {EXP} --tp 8", {f"--tp 8: {TP}"}),
    (
        "",
        f"--model {EXP} --tp 8 --nsa-prefill-backend tilelang --nsa-decode-backend tilelang",
        {f"--tp 8: {TP}", f"--nsa-prefill-backend tilelang: {GPU}", f"--nsa-decode-backend tilelang: {GPU}"},
    ),
    (
        AMD,
        f"--model-path {EXP} --disable-cuda-graph --tp 8 --mem-fraction-static 0.85 --page-size 64 "
        '--nsa-prefill "tilelang" --nsa-decode "aiter"',
        {f"--tp 8: {TP}", f"--nsa-prefill tilelang: {GPU}", f"--nsa-decode aiter: {GPU}"},
    ),
    (
        "",
        f"--model-path {EXP} --trust-remote-code --attention-backend ascend --mem-fraction-static 0.85 "
        "--chunked-prefill-size 32768 --disable-radix-cache --tp-size 16 --quantization w8a8_int8",
        {
            f"--attention-backend ascend: {ATTENTION}",
            f"--tp-size 16: {TP}",
            "--quantization w8a8_int8: needs a checkpoint quantised so; this one's is fp8",
        },
    ),
    (
        "",
        f"--model {EXP} --tp 8 --dp 8 --enable-dp-attention {EAGLE}",
        {f"--tp 8: {TP}", DP8, EAGLE_REFUSED},
    ),
    ("", f"--model {EXP} --tp 8 {EAGLE}", {f"--tp 8: {TP}", EAGLE_REFUSED}),
    (
        "",
        f"--model-path {EXP} --trust-remote-code --tp-size 8 --dp-size 8 --enable-dp-attention --tool-call-parser "
        "deepseekv31 --reasoning-parser deepseek-v3 --chat-template ./tool_chat_template_deepseekv32.jinja",
        {
            f"--tp-size 8: {TP}",
            DP8_SIZE,
            f"--chat-template ./tool_chat_template_deepseekv32.jinja: {NO_FILE}",
        },
    ),
    (
        "",
        f"--model-path {V32} --trust-remote-code --tp-size 8 --dp-size 8 --enable-dp-attention "
        "--tool-call-parser deepseekv32 --reasoning-parser deepseek-v3",
        {
            f"--tp-size 8: {TP}",
            DP8_SIZE,
        },
    ),
    (
        "",
        f"--model-path {SPECIALE} --trust-remote-code --tp-size 8 --dp-size 8 --enable-dp-attention "
        "--reasoning-parser deepseek-v3",
        {f"--tp-size 8: {TP}", DP8_SIZE},
    ),
    (
        "",
        f"--model {NVFP4} --tp 4 --quantization modelopt_fp4 --moe-runner-backend flashinfer_trtllm "
        "--tool-call-parser deepseekv32 --reasoning-parser deepseek-v3",
        {
            f"--tp 4: {TP}",
            "config.json quantization_config NVFP4: needs its weight format and kernels, not built yet",
            "--quantization modelopt_fp4: needs its weight format and kernels, not built yet",
            f"--moe-runner-backend flashinfer_trtllm: {EXPERTS}",
        },
    ),
    (
        "",
        f"--model-path {EXP} --disaggregation-mode prefill --host 10.0.0.1 --port 30000 --tp 8 --dp 8 "
        "--enable-dp-attention --dist-init-addr 10.0.0.1:5000 --trust-remote-code --disaggregation-bootstrap-port 8998 "
        "--mem-fraction-static 0.9",
        {
            f"--disaggregation-mode prefill, --disaggregation-bootstrap-port 8998: {PD}",
            f"--tp 8: {TP}",
            DP8,
            f"--dist-init-addr 10.0.0.1:5000: {RANKS}",
        },
    ),
    (
        "",
        f"--model-path {EXP} --disaggregation-mode decode --host 10.0.0.1 --port 30000 --tp 8 --dp 8 "
        "--enable-dp-attention --dist-init-addr 10.0.0.1:5000 --trust-remote-code --mem-fraction-static 0.9",
        {
            f"--disaggregation-mode decode: {PD}",
            f"--tp 8: {TP}",
            DP8,
            f"--dist-init-addr 10.0.0.1:5000: {RANKS}",
        },
    ),
    (
        "",
        f"--model {EXP} --tp 8 --ep 8 --dp 2 --enable-dp-attention {NSA_CP} --nsa-prefill-cp-mode in-seq-split "
        "--max-running-requests 32",
        {
            f"--tp 8: {TP}",
            f"--ep 8: {EP}",
            f"--dp 2, --enable-dp-attention: {DP}",
            f"{NSA_CP}, --nsa-prefill-cp-mode in-seq-split: {CP}",
        },
    ),
    (
        "",
        f"--model {EXP} --tp 8 --ep 8 --dp 2 --enable-dp-attention {NSA_CP} --attn-cp-size 4 "
        "--nsa-prefill-cp-mode in-seq-split --max-running-requests 32",
        {
            f"--tp 8: {TP}",
            f"--ep 8: {EP}",
            f"--dp 2, --enable-dp-attention: {DP}",
            f"{NSA_CP}, --attn-cp-size 4, --nsa-prefill-cp-mode in-seq-split: {CP}",
        },
    ),
    (
        "",
        f"--model {EXP} --tp 8 {NSA_CP} --nsa-prefill-cp-mode round-robin-split --max-running-requests 32",
        {f"--tp 8: {TP}", f"{NSA_CP}, --nsa-prefill-cp-mode round-robin-split: {CP}"},
    ),
    (
        "",
        f"--model {EXP} --tp 8 {NSA_CP} --attn-cp-size 8 --nsa-prefill-cp-mode round-robin-split "
        "--max-running-requests 32",
        {f"--tp 8: {TP}", f"{NSA_CP}, --attn-cp-size 8, --nsa-prefill-cp-mode round-robin-split: {CP}"},
    ),
    (
        "SGLANG_PP_LAYER_PARTITION=30,31",
        f"--model-path {EXP} {PIPELINE} --trust-remote-code --disable-radix-cache --mem-fraction-static 0.8 "
        "--max-running-requests 128 --chunked-prefill-size 16384 --cuda-graph-max-bs 8 --page-size 64 "
        "--watchdog-timeout 3600 --host 0.0.0.0 --port 8000 --tool-call-parser deepseekv32",
        PIPELINE_REFUSED
        | {
            f"--pp-size 2, SGLANG_PP_LAYER_PARTITION 30,31: {PP}",
            f"--watchdog-timeout 3600: {WATCHDOG}",
        },
    ),
    (
        "",
        f"--model-path {EXP} --served-model-name deepseek-v32 {PIPELINE} --disaggregation-ib-device "
        "mlx5_bond_0,mlx5_bond_1,mlx5_bond_2,mlx5_bond_3 --trust-remote-code --disable-radix-cache "
        "--max-running-requests 512 --chunked-prefill-size 4096 --context-length 131072 --mem-fraction-static 0.9 "
        "--page-size 64 --enable-metrics --collect-tokens-histogram --tokenizer-worker-num 8 --host 0.0.0.0 "
        "--port 30000",
        PIPELINE_REFUSED
        | {
            f"--pp-size 2: {PP}",
            f"--disaggregation-ib-device mlx5_bond_0,mlx5_bond_1,mlx5_bond_2,mlx5_bond_3: {PD}",
        },
    ),
]
IDS = [f"{number}" for number in range(1, len(LINES) + 1)]


def resolve(variables: str, line: str, folder: Path) -> Resolution:
    environ = dict(pair.split("=", 1) for pair in variables.split())
    return flags.resolve([*shlex.split(line), "--dry-run"], {"HF_HUB_CACHE": str(folder), **environ}, MACHINE)


def leaves(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    return [value]


@pytest.mark.parametrize(("variables", "line", "refused"), LINES, ids=IDS)
def test_line_resolves(tmp_path: Path, variables: str, line: str, refused: set[str]) -> None:
    resolution = resolve(variables, line, tmp_path)
    assert set(resolution.refusals) == refused
    assert len(resolution.refusals) == len(refused)
    assert AUTO not in leaves(resolution.config)
    assert resolution.config.cache.page_size == 64


@pytest.mark.parametrize(("variables", "line", "refused"), LINES, ids=IDS)
def test_no_word_of_a_line_is_ignored(tmp_path: Path, variables: str, line: str, refused: set[str]) -> None:
    """Each flag and variable is either refused, warned about, explained, or changes the config."""
    resolution = resolve(variables, line, tmp_path)
    said = " ".join([*resolution.refusals, *resolution.warnings])
    used = {"--model", "--model-path", "--host", "--port", "--page-size", "--mem-fraction-static"}
    used |= {"--chunked-prefill-size", "--disable-radix-cache", "--max-running-requests", "--served-model-name"}
    used |= {"--context-length", "--enable-metrics", "--dp-size", "--moe-dense-tp-size", "--node-rank"}
    used |= {"--tool-call-parser", "--reasoning-parser"}
    used |= {"--tokenizer-worker-num"}
    for word in [*shlex.split(line), *(pair.split("=")[0] for pair in variables.split())]:
        if word.startswith(("--", "SGLANG_")):
            assert word in said or word in used, word


def test_values_of_a_line_arrive(tmp_path: Path) -> None:
    config = resolve(*LINES[-1][:2], tmp_path).config
    assert (config.scheduler.max_running_requests, config.scheduler.chunked_prefill_size) == (512, 4096)
    assert (config.load.context_length, config.cache.mem_fraction_static) == (131072, 0.9)
    assert (config.cache.disable_radix_cache, config.server.served_model_name) == (True, "deepseek-v32")
    assert (config.server.host, config.server.port, config.parallel.cp_strategy) == ("0.0.0.0", 30000, "interleave")
    assert config.server.tokenizer_worker_num == 8


def test_removed_variables_warn_once(tmp_path: Path) -> None:
    warnings = resolve(*LINES[4][:2], tmp_path).warnings
    (line,) = [line for line in warnings if "SGLANG_" in line]
    assert all(pair.split("=")[0] in line for pair in AMD.split())


@pytest.mark.parametrize(("variables", "line", "refused"), LINES, ids=IDS)
def test_line_without_the_model_is_refused_too(
    tmp_path: Path, variables: str, line: str, refused: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As typed, without --dry-run: exit code 2, one line for each refusal, none a traceback."""
    environ = dict(pair.split("=", 1) for pair in variables.split())
    assert command(["serve", *shlex.split(line)], {"HF_HUB_CACHE": str(tmp_path), **environ}) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if "warning" not in text]
    assert {f"baleen: error: {text}" for text in refused} <= set(errors)
    assert all(text.startswith("baleen: error: ") for text in errors)


# Every spelling that works. A removal breaks somebody's launch line.
SPELLINGS = [
    "--api-key", "--attention-backend", "--attention-context-parallel-size", "--attn-cp-size", "--chat-template",
    "--chunked-prefill-size", "--collect-tokens-histogram", "--context-length", "--cp-strategy",
    "--cuda-graph-max-bs", "--cuda-graph-max-bs-decode", "--data-parallel-size", "--dense-prefill-threshold",
    "--device", "--disable-cuda-graph", "--disable-overlap-schedule", "--disable-radix-cache",
    "--disaggregation-bootstrap-port", "--disaggregation-ib-device", "--disaggregation-mode", "--dist-init-addr",
    "--dp", "--dp-size", "--dsa-decode-backend", "--dsa-prefill-backend", "--dsa-prefill-cp-mode",
    "--dsa-topk-backend", "--dtype", "--enable-dp-attention", "--enable-dsa-prefill-context-parallel",
    "--enable-hierarchical-cache", "--enable-hisparse", "--enable-metrics", "--enable-mixed-chunk",
    "--enable-nsa-prefill-context-parallel", "--enable-prefill-cp", "--enable-priority-scheduling",
    "--ep", "--ep-size", "--expert-parallel-size", "--host", "--index-cache-dtype",
    "--json-model-override-args", "--kernels", "--kv-cache-dtype", "--load-format",
    "--log-level", "--max-queued-requests", "--max-request-body-size", "--max-running-requests",
    "--max-total-tokens", "--mem-fraction-static",
    "--model", "--model-path", "--moe-dense-tp-size", "--moe-runner-backend", "--nccl-init-addr", "--nnodes",
    "--node-rank", "--nsa-decode", "--nsa-decode-backend", "--nsa-prefill", "--nsa-prefill-backend",
    "--nsa-prefill-cp-mode", "--page-size", "--pipeline-parallel-size", "--port", "--pp", "--pp-size",
    "--quantization", "--radix-eviction-policy", "--random-seed", "--reasoning-parser",
    "--request-running-timeout", "--request-waiting-timeout", "--revision", "--schedule-conservativeness",
    "--schedule-low-priority-values-first", "--schedule-policy", "--served-model-name", "--skip-server-warmup",
    "--speculative-algorithm",
    "--speculative-eagle-topk", "--speculative-num-draft-tokens", "--speculative-num-steps", "--tensor-parallel-size",
    "--tokenizer-path", "--tokenizer-worker-num", "--tool-call-parser", "--tp", "--tp-size", "--trust-remote-code",
    "--watchdog-timeout",
]  # fmt: skip


def test_flag_spellings_are_frozen() -> None:
    declared = [s for setting in settings().values() for s in setting.metadata["flags"] + setting.metadata["old"]]
    assert sorted(declared) == sorted(SPELLINGS)
