"""What `auto` becomes on a GPU, and what is refused there, from descriptions of machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baleen import flags
from baleen.attention.backend import ATTENTION
from baleen.config import PUBLISHED
from baleen.device_choices import BACKENDS
from baleen.flags import Hardware, Resolution

GIB = 1024**3
LIBRARIES = frozenset({"deep_gemm", "flash_mla"})
ALL = LIBRARIES | {"flash_attn_interface", "tilelang", "flashinfer", "aiter", "triton"}
H200 = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 90, LIBRARIES)
FULL = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 90, ALL)
BARE = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 90)
A100 = Hardware("cuda", 64 * GIB, 16, 80 * GIB, 80, ALL)
B200 = Hardware("cuda", 64 * GIB, 16, 180 * GIB, 100, ALL)
MI300X = Hardware("cuda", 64 * GIB, 16, 190 * GIB, 94, ALL, is_amd=True)
CPU = Hardware("cpu", 64 * GIB, 16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The released model with two layers and 32 experts."""
    return write(tmp_path)


def write(folder: Path, **changes: Any) -> Path:
    few = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "n_routed_experts": 32}
    config = {**PUBLISHED["deepseek-ai/DeepSeek-V3.2"], **few, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(folder: Path, line: str = "", machine: Hardware = H200) -> Resolution:
    return flags.resolve(["--model", str(folder), *line.split()], {}, machine)


def test_hopper_with_its_libraries(checkpoint: Path) -> None:
    resolution = run(checkpoint)
    config = resolution.config
    assert (resolution.refusals, resolution.warnings) == ([], [])
    assert (config.load.device, config.load.dtype, config.cache.kv_cache_dtype) == ("cuda", "bfloat16", "bfloat16")
    assert config.cache.index_cache_dtype == "fp8_e4m3"
    assert (config.attention.prefill_backend, config.attention.decode_backend) == ("flashmla_sparse",) * 2
    assert (config.attention.kernels, config.attention.moe_runner_backend) == ("fastest", "fastest")
    assert not config.scheduler.disable_cuda_graph
    assert config.scheduler.chunked_prefill_size == 8192
    assert config.attention.dense_prefill_threshold == 8192
    fp8 = run(checkpoint, "--kv-cache-dtype fp8_e4m3").config.attention
    assert (fp8.prefill_backend, fp8.decode_backend) == ("flashmla_sparse", "flashmla_kv")


def test_the_pool_fills_its_share_of_the_card(checkpoint: Path) -> None:
    plan = run(checkpoint, machine=Hardware("cuda", 64 * GIB, 16, 40 * GIB, 90, LIBRARIES)).plan
    assert plan.available == 40 * GIB
    assert plan.budget == int(0.85 * 40 * GIB)
    assert plan.weights["routed experts"] == plan.checkpoint["routed experts"], "FP8 stays FP8"
    # 128 requests of the whole context are more than the card holds
    assert plan.budget - 64 * plan.token < plan.total <= plan.budget
    assert "CUDA graphs" in plan.table()
    without = run(checkpoint, "--disable-cuda-graph").plan
    assert without.step["CUDA graphs"] == 0 < plan.step["CUDA graphs"]
    (line,) = run(checkpoint, machine=Hardware("cuda", 64 * GIB, 16, 4 * GIB, 90, LIBRARIES)).refusals
    assert "--mem-fraction-static 0.85: needs" in line


@pytest.mark.parametrize(
    ("machine", "text"),
    [(BARE, "pip install sgl-flash-mla"), (Hardware("cuda", 1, 1, 140 * GIB, 80, LIBRARIES), "this GPU has 8.0")],
)
def test_without_flashmla_the_reference_runs_and_says_so(checkpoint: Path, machine: Hardware, text: str) -> None:
    resolution = run(checkpoint, machine=machine)
    config = resolution.config
    assert resolution.refusals == []
    assert (config.attention.prefill_backend, config.attention.decode_backend) == ("reference", "reference")
    assert config.scheduler.disable_cuda_graph
    said = " ".join(resolution.warnings)
    assert text in said
    assert "without CUDA graphs" in said


@pytest.mark.parametrize(
    ("line", "machine", "text"),
    [
        ("--device cuda", CPU, "--device cuda: no GPU found"),
        ("--nsa-decode-backend flashmla_kv", CPU, "--nsa-decode-backend flashmla_kv: runs on a GPU; reference runs"),
        ("--nsa-prefill-backend flashmla_sparse", BARE, "is not installed (pip install sgl-flash-mla)"),
        ("--dsa-decode-backend flashmla_kv", H200, "add --kv-cache-dtype fp8_e4m3"),
        ("--dsa-decode-backend flashmla_sparse --kv-cache-dtype fp8_e4m3", H200, "add --kv-cache-dtype bfloat16"),
        ("--dsa-decode-backend flashmla_sparse --kv-cache-dtype fp8_e4m3", FULL, "; flashmla_kv, triton and reference"),
        ("--dsa-decode-backend flashmla_auto", H200, "not built yet"),
        ("--dsa-prefill-backend flashmla_sparse --dtype float32", H200, "computes in bfloat16"),
        ("--dsa-prefill-backend flashmla_sparse_q8", FULL, "needs queries in FP8, not built yet"),
        ("--nsa-decode-backend fa3", BARE, "fa3: is not installed (build FlashAttention's folder hopper)"),
        ("--nsa-prefill-backend fa3", B200, "fa3: runs on Hopper (compute capability 9.0), and this GPU has 10.0"),
        ("--nsa-decode-backend fa3 --kv-cache-dtype fp8_e4m3", FULL, "reads a cache in bfloat16"),
        ("--nsa-prefill-backend tilelang", BARE, "tilelang: is not installed (pip install tilelang)"),
        ("--nsa-decode-backend tilelang --kv-cache-dtype fp8_e4m3", FULL, "; flashmla_kv, triton and reference run"),
        ("--nsa-decode-backend trtllm", FULL, "runs on Blackwell (compute capability 10.0), and this GPU has 9.0"),
        ("--nsa-prefill-backend trtllm --kv-cache-dtype fp8_e4m3", B200, "add --kv-cache-dtype bfloat16"),
        ("--nsa-decode-backend aiter", FULL, "aiter: runs on AMD's GPUs, and this GPU is NVIDIA's"),
        ("--nsa-decode-backend flashmla_sparse", MI300X, "and this GPU is AMD's; reference runs here"),
        ("--nsa-decode-backend triton", BARE, "triton: is not installed (pip install triton)"),
        ("--nsa-decode-backend triton --kernels reference", FULL, "which --kernels reference turns off"),
        ("--nsa-decode-backend triton --kv-cache-dtype fp8_e4m3", A100, "add --kv-cache-dtype bfloat16"),
        ("--moe-runner-backend deep_gemm", BARE, "--moe-runner-backend deep_gemm: is not installed"),
        ("--moe-runner-backend deep_gemm", CPU, "--moe-runner-backend deep_gemm: runs on a GPU"),
    ],
)
def test_refused_with_the_reason(checkpoint: Path, line: str, machine: Hardware, text: str) -> None:
    (refusal,) = run(checkpoint, line, machine).refusals
    assert text in refusal


@pytest.mark.parametrize(
    ("prefill", "decode", "machine"),
    [
        ("fa3", "fa3", FULL),
        ("tilelang", "tilelang", FULL),
        ("tilelang", "triton", A100),
        ("triton", "triton", FULL),
        ("trtllm", "trtllm", B200),
        ("aiter", "aiter", MI300X),
        ("flashmla_sparse", "fa3", FULL),
    ],
)
def test_libraries_by_name(checkpoint: Path, prefill: str, decode: str, machine: Hardware) -> None:
    resolution = run(checkpoint, f"--nsa-prefill-backend {prefill} --nsa-decode-backend {decode}", machine)
    attention = resolution.config.attention
    assert resolution.refusals == []
    assert (attention.prefill_backend, attention.decode_backend) == (prefill, decode)
    assert any("never run" in line for line in resolution.warnings) == (prefill in ("trtllm", "aiter"))
    assert resolution.config.scheduler.disable_cuda_graph == (machine is not FULL), "deep_gemm is for Hopper"
    assert attention.kernels == ("reference" if machine.is_amd else "fastest")


def test_every_backend_says_what_it_runs_on() -> None:
    assert set(ATTENTION) == {"reference", *BACKENDS}


@pytest.mark.parametrize("name", ["fa3", "tilelang", "triton"])
def test_prefill_over_an_fp8_cache_by_name(checkpoint: Path, name: str) -> None:
    line = f"--nsa-prefill-backend {name} --kv-cache-dtype fp8_e4m3"
    attention = run(checkpoint, line, FULL).config.attention
    assert (attention.prefill_backend, attention.decode_backend) == (name, "flashmla_kv")


@pytest.mark.parametrize("cache", ["bfloat16", "fp8_e4m3"])
def test_without_flashmla_our_own_kernels_run(checkpoint: Path, cache: str) -> None:
    machine = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 90, frozenset({"triton", "deep_gemm", "tilelang"}))
    resolution = run(checkpoint, f"--kv-cache-dtype {cache}", machine)
    attention = resolution.config.attention
    assert (resolution.refusals, resolution.warnings) == ([], [])
    assert (attention.prefill_backend, attention.decode_backend) == ("triton", "triton")
    assert "FlashMLA is not installed" in resolution.reasons["attention.decode_backend"]
    assert not resolution.config.scheduler.disable_cuda_graph
    old = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 75, ALL)
    assert run(checkpoint, machine=old).config.attention.decode_backend == "reference"
    assert run(checkpoint, "--kernels reference", machine).config.attention.decode_backend == "reference"


def test_an_amd_gpu_runs_plain_torch(checkpoint: Path) -> None:
    resolution = run(checkpoint, machine=MI300X)
    attention = resolution.config.attention
    assert resolution.refusals == []
    assert {attention.prefill_backend, attention.decode_backend, attention.kernels} == {"reference"}
    assert any("this GPU is AMD's" in line for line in resolution.warnings)


def test_backends_by_name(checkpoint: Path) -> None:
    auto = run(checkpoint, "--nsa-prefill-backend flashmla_auto --kv-cache-dtype fp8_e4m3")
    assert (auto.refusals, auto.config.attention.prefill_backend) == ([], "flashmla_kv")
    assert run(checkpoint, "--nsa-prefill-backend flashmla_auto").config.attention.prefill_backend == "flashmla_sparse"
    plain = run(
        checkpoint, "--dsa-prefill-backend reference --dsa-decode-backend reference --dense-prefill-threshold 64"
    )
    assert plain.refusals == []
    assert plain.config.attention.dense_prefill_threshold == 64
    short = run(checkpoint, "--dense-prefill-threshold 64")
    assert (short.config.attention.dense_prefill_threshold, short.warnings) == (64, [])


@pytest.mark.parametrize(
    "line", ["--kernels reference", "--moe-runner-backend reference", "--dsa-topk-backend reference"]
)
def test_a_reference_in_a_decode_step_waits_and_leaves_no_graph(checkpoint: Path, line: str) -> None:
    resolution = run(checkpoint, line)
    assert resolution.refusals == []
    assert resolution.config.scheduler.disable_cuda_graph
    assert any("without CUDA graphs" in warning for warning in resolution.warnings)


def test_graph_flags_are_used_on_a_gpu(checkpoint: Path) -> None:
    resolution = run(checkpoint, "--disable-cuda-graph --cuda-graph-max-bs-decode 8")
    assert resolution.warnings == []
    assert (resolution.config.scheduler.disable_cuda_graph, resolution.config.scheduler.cuda_graph_max_bs) == (True, 8)


def test_other_models_dims_run_without_flashmla(tmp_path: Path) -> None:
    folder = write(tmp_path, kv_lora_rank=256)
    assert run(folder, machine=FULL).config.attention.decode_backend == "triton"
    resolution = run(folder)
    assert resolution.config.attention.decode_backend == "reference"
    assert any("latents of 512 + 64" in line for line in resolution.warnings)
