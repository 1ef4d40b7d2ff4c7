"""What `auto` becomes on a GPU, and what is refused there, from descriptions of machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baleen import flags
from baleen.config import PUBLISHED
from baleen.flags import Hardware, Resolution

GIB = 1024**3
LIBRARIES = frozenset({"deep_gemm", "flash_mla"})
H200 = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 90, LIBRARIES)
BARE = Hardware("cuda", 64 * GIB, 16, 140 * GIB, 90)
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
    assert config.attention.dense_prefill_threshold == 0
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
        ("--dsa-decode-backend flashmla_sparse --kv-cache-dtype fp8_e4m3", H200, "use flashmla_kv"),
        ("--dsa-decode-backend flashmla_auto", H200, "not built yet"),
        ("--dsa-prefill-backend flashmla_sparse --dtype float32", H200, "computes in bfloat16"),
        ("--moe-runner-backend deep_gemm", BARE, "--moe-runner-backend deep_gemm: is not installed"),
        ("--moe-runner-backend deep_gemm", CPU, "--moe-runner-backend deep_gemm: runs on a GPU"),
    ],
)
def test_refused_with_the_reason(checkpoint: Path, line: str, machine: Hardware, text: str) -> None:
    (refusal,) = run(checkpoint, line, machine).refusals
    assert text in refusal


def test_backends_by_name(checkpoint: Path) -> None:
    auto = run(checkpoint, "--nsa-prefill-backend flashmla_auto --kv-cache-dtype fp8_e4m3")
    assert (auto.refusals, auto.config.attention.prefill_backend) == ([], "flashmla_kv")
    assert run(checkpoint, "--nsa-prefill-backend flashmla_auto").config.attention.prefill_backend == "flashmla_sparse"
    plain = run(
        checkpoint, "--dsa-prefill-backend reference --dsa-decode-backend reference --dense-prefill-threshold 64"
    )
    assert plain.refusals == []
    assert plain.config.attention.dense_prefill_threshold == 64
    sparse = run(checkpoint, "--dense-prefill-threshold 64")
    assert any("--dense-prefill-threshold: no effect" in line for line in sparse.warnings)


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
    resolution = run(write(tmp_path, kv_lora_rank=256))
    assert resolution.config.attention.decode_backend == "reference"
    assert any("latents of 512 + 64" in line for line in resolution.warnings)
