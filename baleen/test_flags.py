"""From a launch line to a config: parsing, automatic choices, refusals, where the model is found."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from baleen import flags
from baleen.__main__ import command
from baleen.config import AUTO, PUBLISHED, ConfigError
from baleen.flags import Hardware, Resolution
from baleen.resolver import kind_of, settings

GIB = 1024**3
MACHINE = Hardware("cpu", 8 * GIB, 2)
SMALL: dict[str, Any] = {
    **PUBLISHED["deepseek-ai/DeepSeek-V3.2"],
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_nextn_predict_layers": 0,
    "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 128, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8, "intermediate_size": 96,
    "moe_intermediate_size": 32, "n_routed_experts": 16, "num_experts_per_tok": 2, "max_position_embeddings": 4096,
    "quantization_config": None, "torch_dtype": "float32",
}  # fmt: skip


def write(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **keys}))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return str(write(tmp_path / "checkpoint"))


def run(
    checkpoint: str, line: str = "", environ: Mapping[str, str] | None = None, machine: Hardware = MACHINE
) -> Resolution:
    return flags.resolve(["--model", checkpoint, *line.split()], environ or {}, machine)


def leaves(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    return [value]


# ---- automatic choices


def test_defaults_on_a_cpu(checkpoint: str) -> None:
    resolution = run(checkpoint)
    config = resolution.config
    assert (resolution.warnings, resolution.refusals) == ([], [])
    assert (config.model_path, config.load.tokenizer_path) == (checkpoint, checkpoint)
    assert (config.load.device, config.load.dtype, config.load.load_format) == ("cpu", "float32", "safetensors")
    assert (config.load.context_length, config.load.quantization) == (4096, "none")
    assert (config.cache.kv_cache_dtype, config.cache.index_cache_dtype, config.cache.page_size) == ("float32",) * 2 + (
        64,
    )
    assert (config.scheduler.max_running_requests, config.scheduler.chunked_prefill_size) == (64, 512)
    assert (config.scheduler.schedule_policy, config.scheduler.max_queued_requests) == ("fcfs", None)
    assert (config.attention.prefill_backend, config.attention.kernels) == ("reference", "reference")
    assert config.attention.dense_prefill_threshold == 6 * 8
    assert (config.server.host, config.server.port, config.server.served_model_name) == ("127.0.0.1", 30000, checkpoint)
    assert AUTO not in leaves(config)


def test_every_automatic_choice_has_a_reason(checkpoint: str) -> None:
    resolution = run(checkpoint)
    opened = {key for key, setting in settings().items() if setting.metadata["default"] == AUTO}
    assert set(resolution.reasons) == opened - {"load.model_path"}
    assert all(resolution.reasons.values())


def test_a_given_value_stays_and_has_no_reason(checkpoint: str) -> None:
    resolution = run(
        checkpoint, "--kv-cache-dtype bf16 --random-seed 7 --dsa-topk-backend torch --max-running-requests 8"
    )
    assert resolution.config.cache.kv_cache_dtype == "bfloat16"
    assert resolution.config.load.random_seed == 7
    assert resolution.config.attention.topk_backend == "reference"
    assert not {"cache.kv_cache_dtype", "load.random_seed", "attention.topk_backend"} & set(resolution.reasons)
    assert resolution.refusals == []


def test_auto_written_out_is_auto(checkpoint: str) -> None:
    line = "--kv-cache-dtype auto --dtype auto --load-format auto --attention-backend auto --moe-runner-backend auto"
    resolution = run(checkpoint, line + " --random-seed 1")
    assert resolution.config == run(checkpoint, "--random-seed 1").config
    assert resolution.refusals == []


def test_fp8_checkpoint_selects_as_released(tmp_path: Path) -> None:
    fp8 = write(tmp_path / "fp8", quantization_config=PUBLISHED["deepseek-ai/DeepSeek-V3.2"]["quantization_config"])
    resolution = run(str(fp8), "--quantization fp8")
    assert resolution.config.cache.index_cache_dtype == "fp8_e4m3"
    assert "FP8" in resolution.reasons["cache.index_cache_dtype"]
    assert (resolution.config.load.dtype, resolution.refusals) == ("float32", [])


def test_pool_takes_what_the_budget_leaves(checkpoint: str) -> None:
    plenty = run(checkpoint).config.cache.max_total_tokens
    assert plenty == 8 * 4096
    tight = run(checkpoint, machine=Hardware("cpu", 350 * 1024**2, 2))
    assert tight.refusals == []
    assert 4096 < tight.config.cache.max_total_tokens < plenty
    assert tight.config.cache.max_total_tokens % 64 == 0
    assert tight.plan.budget - 64 * tight.plan.token < tight.plan.total <= tight.plan.budget
    more = run(checkpoint, "--mem-fraction-static 0.6", machine=Hardware("cpu", 350 * 1024**2, 2))
    assert more.config.cache.max_total_tokens > tight.config.cache.max_total_tokens


def test_what_does_not_fit_is_refused(checkpoint: str) -> None:
    (line,) = run(checkpoint, machine=Hardware("cpu", 64 * 1024**2, 2)).refusals
    assert line.startswith("--mem-fraction-static 0.5: needs ")
    (line,) = run(checkpoint, "--max-total-tokens 64m").refusals
    assert "64000000 cached tokens" in line


def test_pool_smaller_than_the_context_warns(checkpoint: str) -> None:
    resolution = run(checkpoint, "--max-total-tokens 1000")
    assert resolution.config.cache.max_total_tokens == 960
    assert [line.split(":")[0] for line in resolution.warnings] == ["--max-total-tokens 1000", "--max-total-tokens 960"]


@pytest.mark.parametrize(
    ("line", "chunk", "running"),
    [
        ("", 512, 64),
        ("--max-running-requests 500", 576, 500),
        ("--chunked-prefill-size 64", 64, 32),
        ("--chunked-prefill-size 128 --max-running-requests 100", 128, 100),
        ("--chunked-prefill-size -1", 4096 + 64, 64),
        ("--chunked-prefill-size -1 --context-length 1k", 1024 + 64, 64),
    ],
)
def test_sizes_of_a_step(checkpoint: str, line: str, chunk: int, running: int) -> None:
    scheduler = run(checkpoint, line).config.scheduler
    assert (scheduler.chunked_prefill_size, scheduler.max_running_requests) == (chunk, running)


@pytest.mark.parametrize(("text", "tokens"), [("2048", 2048), ("2k", 2000), ("2K", 2048), ("1.5k", 1500)])
def test_context_length_with_a_suffix(checkpoint: str, text: str, tokens: int) -> None:
    assert run(checkpoint, f"--context-length {text}").config.load.context_length == tokens


# ---- spellings, warnings, refusals


@pytest.mark.parametrize("flag", ["--tp-size", "--tp", "--tensor-parallel-size", "--tp-s", "--tensor"])
def test_spellings_and_prefixes(checkpoint: str, flag: str) -> None:
    resolution = run(checkpoint, f"{flag} 8")
    assert resolution.config.parallel.tp_size == 8
    (line,) = resolution.refusals
    assert line.endswith(" 8: needs tensor parallelism, not built yet")


def test_old_spellings_warn(checkpoint: str) -> None:
    resolution = run(checkpoint, "--nsa-prefill reference --nsa-decode-backend reference")
    assert resolution.warnings == [
        "--nsa-prefill: old spelling of --dsa-prefill-backend",
        "--nsa-decode-backend: old spelling of --dsa-decode-backend",
    ]
    assert resolution.refusals == []
    assert run(checkpoint, "--attention-backend nsa").config.attention.attention_backend == "dsa"


def test_one_line_for_one_missing_thing(checkpoint: str) -> None:
    line = "--speculative-algorithm EAGLE --speculative-num-steps 3 --schedule-policy lof"
    assert run(checkpoint, line).refusals == [
        "--speculative-algorithm EAGLE, --speculative-num-steps 3: needs multi-token prediction, not built yet",
        "--schedule-policy lof: needs another policy than fcfs, lpm and priority, not built yet",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ("fcfs", False, False)),
        ("--enable-priority-scheduling", ("fcfs", True, False)),
        ("--schedule-policy lpm --enable-priority-scheduling", ("lpm", True, False)),
        ("--schedule-policy priority", ("priority", True, False)),
        ("--schedule-policy priority --schedule-low-priority-values-first", ("priority", True, True)),
    ],
)
def test_priorities(checkpoint: str, line: str, expected: tuple[str, bool, bool]) -> None:
    scheduler = run(checkpoint, line).config.scheduler
    values = scheduler.enable_priority_scheduling, scheduler.schedule_low_priority_values_first
    assert (scheduler.schedule_policy, *values) == expected


def test_an_order_of_priorities_needs_priorities(checkpoint: str) -> None:
    (line,) = run(checkpoint, "--schedule-low-priority-values-first").refusals
    assert line == "--schedule-low-priority-values-first: priorities are off; add --enable-priority-scheduling"


def test_timeouts_by_flag_and_variable(checkpoint: str) -> None:
    line, variables = "--request-running-timeout 9", {"SGLANG_REQ_WAITING_TIMEOUT": "2.5"}
    scheduler = run(checkpoint, line, variables).config.scheduler
    assert (scheduler.request_waiting_timeout, scheduler.request_running_timeout) == (2.5, 9.0)
    off = run(checkpoint, "", {"SGLANG_REQ_WAITING_TIMEOUT": "-1", "SGLANG_REQ_RUNNING_TIMEOUT": "-1"})
    assert off.config.scheduler == run(checkpoint, "").config.scheduler
    assert off.warnings == []


REFUSED = [
    "--tp 2", "--dp 2", "--ep 2", "--pp 2", "--attn-cp-size 2", "--enable-prefill-cp", "--cp-strategy zigzag",
    "--moe-dense-tp-size 2", "--enable-dp-attention", "--nnodes 2", "--node-rank 1", "--dist-init-addr a:1",
    "--speculative-algorithm NEXTN", "--speculative-eagle-topk 1", "--speculative-num-draft-tokens 4",
    "--disaggregation-mode decode", "--disaggregation-bootstrap-port 8998", "--disaggregation-ib-device mlx5_0",
    "--dsa-prefill-backend flashmla_sparse_q8", "--dsa-decode-backend flashmla_auto", "--dsa-topk-backend sgl-kernel",
    "--moe-runner-backend triton", "--attention-backend fa3", "--enable-hierarchical-cache",
    "--enable-hisparse", "--radix-eviction-policy lfu", "--schedule-policy random", "--watchdog-timeout 300",
    "--quantization w8a8_int8", "--quantization fp8",
]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_refused_by_name(checkpoint: str, line: str) -> None:
    (refusal,) = run(checkpoint, line).refusals
    assert refusal.startswith(f"{line}: needs ")


def test_a_secret_is_not_repeated(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolution = run(checkpoint, "--api-key hunter2")
    assert resolution.config.server.api_key == "hunter2"
    assert "hunter2" not in repr(resolution)
    assert command(["serve", "--model", checkpoint, "--api-key", "hunter2", "--dry-run"], {}) == 0
    shown = "".join(capsys.readouterr())
    assert "hunter2" not in shown
    assert re.search(r"--api-key +\(given\)", shown)


@pytest.mark.parametrize("key", ["", " ", "hunter 2", "hunter2\n", "h\u00fcnter"])
def test_a_key_that_no_header_can_carry_is_refused(checkpoint: str, key: str) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key: is empty or") as refused:
        flags.resolve(["--model", checkpoint, "--api-key", key], {}, MACHINE)
    assert "hunter" not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        "--tp 1 --dp 1 --ep 1 --pp 1 --moe-dense-tp-size 1 --attn-cp-size 1 --nnodes 1 --node-rank 0",
        "--disaggregation-mode null --tokenizer-worker-num 2 --device cpu --quantization none",
        "--disable-radix-cache --disable-overlap-schedule --schedule-policy lpm --schedule-conservativeness 1.3",
        "--max-queued-requests 5 --log-level warning --host 0.0.0.0 --port 8000 --served-model-name whale",
        "--kernels reference --dense-prefill-threshold 0 --load-format dummy --dtype bf16 --radix-eviction-policy lru",
        "--page-size 64 --index-cache-dtype fp8_e4m3 --mem-fraction-static 0.7 --max-total-tokens 128k --revision main",
        "--tool-call-parser deepseekv32 --reasoning-parser deepseek-v3 --chat-template deepseekv32",
    ],
)
def test_used(checkpoint: str, line: str) -> None:
    resolution = run(checkpoint, line)
    assert (resolution.refusals, resolution.warnings) == ([], [])


def test_the_chat_format_is_decided_with_its_reasons(checkpoint: str) -> None:
    def chosen(line: str) -> tuple[str, str, str]:
        server = run(checkpoint, line).config.server
        return server.chat_template, server.tool_call_parser, server.reasoning_parser

    assert chosen("") == ("deepseekv32", "deepseekv32", "deepseek-v3")
    assert chosen("--served-model-name DeepSeek-V3.2-Speciale") == ("deepseekv32-speciale", "none", "deepseek-v3")
    assert chosen("--served-model-name DeepSeek-V3.2-Exp") == ("deepseekv31", "deepseekv31", "deepseek-v3")
    assert chosen("--tool-call-parser deepseek_v31 --reasoning-parser none") == ("deepseekv31", "deepseekv31", "none")
    assert chosen("--reasoning-parser deepseek_v3")[2] == "deepseek-v3"
    reasons = run(checkpoint, "--served-model-name DeepSeek-V3.2-Exp").reasons
    assert reasons["server.chat_template"] == "V3.2-Exp by the name DeepSeek-V3.2-Exp"
    (refusal,) = run(checkpoint, "--chat-template x.jinja").refusals
    assert refusal.startswith("--chat-template x.jinja: there is no such file; give a Jinja file, or one of deepseekv")
    for line in ("--tool-call-parser pythonic", "--reasoning-parser deepseek-r1"):
        with pytest.raises(ConfigError, match="is not a choice; choose from auto, deepseek"):
            run(checkpoint, line)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--trust-remote-code", "no code"),
        ("--page-size 1", "using 64"),
        ("--disable-cuda-graph", "no CUDA graphs"),
        ("--cuda-graph-max-bs-decode 8", "no CUDA graphs"),
        ("--collect-tokens-histogram", "no effect"),
    ],
)
def test_without_effect_warns(checkpoint: str, line: str, text: str) -> None:
    resolution = run(checkpoint, line)
    (warning,) = resolution.warnings
    assert warning.startswith(line.split()[0])
    assert text in warning
    assert resolution.refusals == []
    assert resolution.config.cache.page_size == 64


def test_always_on_says_so(checkpoint: str) -> None:
    resolution = run(checkpoint, "--enable-metrics --enable-mixed-chunk")
    assert "always" in resolution.reasons["server.enable_metrics"]
    assert "always" in resolution.reasons["scheduler.enable_mixed_chunk"]


def test_every_setting_is_used_or_says_otherwise(checkpoint: str) -> None:
    """A flag that is given and changes neither config, nor reasons, warnings or refusals would be ignored."""
    base = run(checkpoint, "--random-seed 1")
    values = {
        "--json-model-override-args": '{"eos_token_id": 2}',
        "--revision": "v2",
        "--tokenizer-path": checkpoint + "/..",
        "--tokenizer-worker-num": "3",
    }
    for key, setting in settings().items():
        meta, kind = setting.metadata, kind_of(key)
        if not meta["flags"] or key in ("load.model_path", "load.random_seed"):
            continue
        flag = meta["flags"][0]
        differs = [c for c in meta["choices"] if c not in (AUTO, meta["default"])]
        value = values.get(flag) or (differs[0] if differs else {int: "128", float: "0.7", str: "x"}.get(kind, ""))
        value = "1" if flag == "--speculative-eagle-topk" else value
        argv = ["--model", checkpoint, "--random-seed", "1", flag, *([value] if kind is not bool else [])]
        got = flags.resolve(argv, {}, MACHINE)
        same_config = got.config == base.config
        said = (got.reasons, got.warnings, got.refusals) != (base.reasons, base.warnings, base.refusals)
        assert said or not same_config, flag


def test_environment(checkpoint: str) -> None:
    name = "PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD"
    for prefix in ("SGLANG_DSA_", "SGLANG_NSA_"):
        resolution = run(checkpoint, "", {prefix + name: "1024"})
        assert (resolution.config.attention.dense_prefill_threshold, resolution.warnings) == (1024, [])
    resolution = run(checkpoint, "--dense-prefill-threshold 5", {"SGLANG_DSA_" + name: "1024"})
    assert resolution.config.attention.dense_prefill_threshold == 5
    assert resolution.warnings == [f"SGLANG_DSA_{name}: no effect, --dense-prefill-threshold sets the same"]
    with pytest.raises(ConfigError, match=f"^SGLANG_DSA_{name}: 'x'"):
        run(checkpoint, "", {"SGLANG_DSA_" + name: "x"})
    (warning,) = run(checkpoint, "", {"SGLANG_B": "1", "SGLANG_A": "1", "PATH": "x"}).warnings
    assert warning.startswith("SGLANG_A, SGLANG_B: no effect")


# ---- errors

ERRORS = [
    ("--modle-path x", "--modle-path", "did you mean --model-path?"),
    ("--max-running-request-count 3", "--max-running-request-count", "did you mean --max-running-requests?"),
    ("--enable-telepathy-with-dolphins", "--enable-telepathy-with-dolphins", "see --help"),
    ("--nsa-p x", "command line", "ambiguous"),
    ("surprise", "'surprise'", "unexpected"),
    ("--tp", "--tp-size", "expected one argument"),
    ("--tp x", "--tp", "whole number"),
    ("--tp 0", "--tp", "at least 1"),
    ("--port 70000", "--port", "at most 65535"),
    ("--mem-fraction-static 1.5", "--mem-fraction-static", "at most 0.99"),
    ("--mem-fraction-static nan", "--mem-fraction-static", "at least"),
    ("--max-total-tokens 3", "--max-total-tokens", "at least 64"),
    ("--max-running-requests -1", "--max-running-requests", "at least 1"),
    ("--disable-radix-cache=yes", "--disable-radix-cache", "takes no value"),
    ("--kv-cache-dtype int4", "--kv-cache-dtype", "choose from"),
    ("--nsa-decode flashmla", "--nsa-decode", "choose from"),
    ("--load-format gguf", "--load-format", "choose from"),
    ("--chunked-prefill-size 100", "--chunked-prefill-size", "multiple of 64"),
    ("--chunked-prefill-size 0", "--chunked-prefill-size", "multiple of 64"),
    ("--chunked-prefill-size 64 --max-running-requests 64", "--chunked-prefill-size", "at least 128"),
    ("--context-length 5k", "--context-length", "at most 4096"),
    ("--context-length 0", "--context-length", "at least 1"),
    ("--speculative-eagle-topk 2", "--speculative-eagle-topk", "at most 1"),
    ("--json-model-override-args {", "--json-model-override-args", "not JSON"),
    ("--json-model-override-args []", "--json-model-override-args", "not a JSON object"),
    ('--json-model-override-args {"n_group":7}', "n_group", "does not divide"),
    ("--tokenizer-path /nowhere", "--tokenizer-path", "not a folder"),
    ("--model /nowhere", "--model", "not a folder"),
]


@pytest.mark.parametrize(("line", "field", "text"), ERRORS, ids=[line for line, _, _ in ERRORS])
def test_error_names_flag_and_fix(
    checkpoint: str, line: str, field: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(checkpoint, line)
    assert caught.value.field == field
    assert text in str(caught.value)
    assert command(["serve", "--model", checkpoint, *line.split()], {}) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"baleen: error: {field}: ")
    assert printed.count("\n") == 1


def test_overrides_reach_the_model(checkpoint: str) -> None:
    argv = ["--model", checkpoint, "--json-model-override-args", '{"index_topk": 16, "index_topk_freq": 4}']
    resolution = flags.resolve(argv, {}, MACHINE)
    assert resolution.config.model.index_topk == 16
    assert [line.split(":")[0] for line in resolution.refusals] == ["config.json index_topk_freq 4"]


def test_fp8_layouts_need_their_block_sizes(tmp_path: Path) -> None:
    odd = str(write(tmp_path / "odd", kv_lora_rank=96))
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype.*kv_lora_rank is 96"):
        run(odd, "--kv-cache-dtype fp8_e4m3")
    wide = str(write(tmp_path / "wide", index_head_dim=256))
    with pytest.raises(ConfigError, match=r"--index-cache-dtype.*index_head_dim is 256"):
        run(wide, "--index-cache-dtype fp8_e4m3")


# ---- where the model is


def test_the_bundled_model_is_the_default() -> None:
    resolution = flags.resolve([], {}, MACHINE)
    assert (Path(resolution.config.model_path) / "model.safetensors.index.json").is_file()
    assert resolution.config.server.served_model_name == "baleen-tiny"
    assert "no --model" in resolution.reasons["load.model_path"]
    named = flags.resolve(["--served-model-name", "mine"], {}, MACHINE)
    assert named.config.server.served_model_name == "mine"


@pytest.mark.parametrize("variables", [{"HF_HUB_CACHE": "hub"}, {"HF_HOME": "."}, {"XDG_CACHE_HOME": "../cache"}])
def test_hub_name_in_the_cache(tmp_path: Path, variables: dict[str, str]) -> None:
    home = tmp_path / "cache" / "huggingface"
    repository = home / "hub" / "models--whales--baleen-s"
    folder = write(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    environ = {name: str((home / where).resolve()) for name, where in variables.items()}
    if "XDG_CACHE_HOME" in environ:
        environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    resolution = flags.resolve(["--model", "whales/baleen-s"], environ, MACHINE)
    assert resolution.config.model_path == str(folder)
    assert resolution.config.server.served_model_name == "whales/baleen-s"
    by_commit = flags.resolve(["--model", "whales/baleen-s", "--revision", "abc123"], environ, MACHINE)
    assert by_commit.config.model_path == str(folder)
    with pytest.raises(ConfigError, match=r"whales/baleen-s \(v2\)"):
        flags.resolve(["--model", "whales/baleen-s", "--revision", "v2"], environ, MACHINE)


def test_published_numbers_are_for_a_dry_run(tmp_path: Path) -> None:
    argv = ["--model", "deepseek-ai/DeepSeek-V3.2"]
    nowhere = {"HF_HUB_CACHE": str(tmp_path)}
    machine = Hardware("cpu", 8192 * GIB, 64)
    dry = flags.resolve([*argv, "--dry-run"], nowhere, machine)
    assert (dry.dry_run, dry.config.model_path, dry.refusals) == (True, "", [])
    assert "published" in dry.reasons["load.model_path"]
    assert dry.config.load.context_length == 163840
    (line,) = flags.resolve(argv, nowhere, machine).refusals
    assert "hf download deepseek-ai/DeepSeek-V3.2" in line
    with pytest.raises(ConfigError, match="hf download whales/unknown"):
        flags.resolve(["--model", "whales/unknown", "--dry-run"], nowhere, machine)


def test_broken_checkpoint_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        run(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        run(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        run(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot read"):
        run(str(tmp_path))
    folder = write(tmp_path / "fp4", quantization_config=None)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    for text in ("{", "[]"):
        (folder / "hf_quant_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"hf_quant_config\.json"):
            run(str(folder))


def test_quantisation_written_beside_the_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "fp4")
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    (line,) = run(str(folder)).refusals
    assert line.startswith("config.json quantization_config NVFP4: needs ")
