"""The commands and the library's way to a config: what is printed, exit codes, settings by name."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baleen.__main__ import _flag, command
from baleen.config import PUBLISHED, Config, ConfigError
from baleen.flags import Hardware, default_config
from baleen.resolver import settings


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder with the config.json of a model of two small layers."""
    small = {"num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 16, "num_nextn_predict_layers": 0}
    small |= {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 64}
    raw = {
        **PUBLISHED["deepseek-ai/DeepSeek-V3.2"],
        **small,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return str(tmp_path)


def test_default_config(checkpoint: str) -> None:
    config = default_config(Path(checkpoint), kv_cache_dtype="fp8_e4m3", chunked_prefill_size=128, random_seed=3)
    assert (config.model_path, config.cache.kv_cache_dtype) == (checkpoint, "fp8_e4m3")
    assert (config.scheduler.chunked_prefill_size, config.scheduler.max_running_requests) == (128, 64)
    assert pickle.loads(pickle.dumps(config)) == config
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"chunk_prefill_size": 64}, "did you mean chunked_prefill_size"),
        ({"tp_size": 2}, "tp_size 2: needs tensor parallelism"),
        ({"max_running_requests": "many"}, "max_running_requests: 'many' is not a whole number"),
        ({"max_running_requests": 1.5}, "max_running_requests: 1.5 is not a whole number"),
        ({"max_running_requests": True}, "max_running_requests: True is not a whole number"),
        ({"disable_radix_cache": 1}, "disable_radix_cache: 1 is not True or False"),
        ({"schedule_policy": None}, "schedule_policy: None is not text"),
    ],
)
def test_default_config_refuses(checkpoint: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        default_config(checkpoint, **settings)


def test_dry_run_prints_everything(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["serve", "--model", checkpoint, "--dry-run", "--disable-cuda-graph"], {}) == 0
    printed = capsys.readouterr().out
    for key in settings():
        assert f"\n  {_flag(key)} " in printed
    assert "# a CPU emulates bfloat16" in printed
    assert "memory plan:" in printed
    assert "--disable-cuda-graph: no effect" in printed
    assert "refused:" not in printed
    assert command(["serve", "--model", checkpoint, "--dry-run", "--tp", "2"], {}) == 2
    assert "refused:\n  --tp 2: needs" in capsys.readouterr().out


def test_help_is_grouped_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["serve", "--help"], {})
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert (
        printed.index("\nload: ")
        < printed.index("--model-path")
        < printed.index("\ncache: ")
        < printed.index("--page-size")
    )


def test_help_marks_what_is_not_built(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["serve", "--help"], {})
    printed = " ".join(capsys.readouterr().out.split())
    assert "--tp N ranks (not built yet)" in printed
    assert "aiter, trtllm, triton] (built: reference, flashmla_sparse, flashmla_kv, fa3," in printed
    assert "--page-size N tokens per page; always 64 --" in printed


def test_start_says_what_was_chosen(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the flag that would change it; --log-level makes it quieter."""
    monkeypatch.setattr("baleen.launch.serve", lambda config: 0)
    line = ["serve", "--model", checkpoint, "--disable-cuda-graph", "--log-level"]
    assert command([*line, "info"], {}) == 0
    printed = capsys.readouterr().err
    assert "warning: --disable-cuda-graph" in printed
    assert "  --dtype float32 " in printed
    assert "a CPU emulates bfloat16" in printed
    assert command([*line, "warning"], {}) == 0
    assert [text.split(":")[1] for text in capsys.readouterr().err.splitlines()] == [" warning"]
    assert command([*line, "error"], {}) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "eval gpqa --num-examples 198 --max-tokens 128000 --repeat 8 --thinking-mode deepseek-v3",
            "eval gpqa: its questions do not come with baleen",
        ),
        (
            "eval aime25 --repeat 4 --temperature 1.0 --top-p 0.95 --max-tokens 64000",
            "eval aime25: its questions do not come with baleen",
        ),
        ("eval gsm8k --num-shot", "--num-shots: expected one argument"),
        ("eval chess", "task: invalid choice"),
        ("eval gsm8k --num-shots 200", "--num-shots: there are 200 problems in all"),
        ("eval gsm8k --num-shots -1", "--num-shots: -1 is negative"),
        ("eval gsm8k --parallel 0", "--parallel: 0 is too small"),
        ("eval json --plot a.png", "--plot: is for needle"),
        ("eval gsm8k --data-path /no/such/file", "--data-path: /no/such/file cannot be read"),
        ("bench serve", "bench serve: needs "),
        ("bench speculative", "bench speculative: needs "),
        (
            "route --pd-disaggregation --prefill http://a:1 8998 --decode http://b:1 --host 127.0.0.1 --port 8000",
            "needs ",
        ),
        ("serv", "unknown command"),
        ("chat --max-tokens 0", "--max-tokens: 0"),
        ("chat --temperature=-1", "--temperature: -1.0"),
    ],
)
def test_other_commands(line: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(line.split(), {}) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("baleen: error: ")
    assert text in printed
    assert printed.count("\n") == 1


def test_no_torch_and_no_traceback() -> None:
    serve = "m.command(['serve', '--model', '/no'], {})"
    code = f"import sys; import baleen.__main__ as m; {serve}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("baleen: error: --model: '/no' is not a folder")
    assert "Traceback" not in done.stderr


def test_detected_hardware_is_plausible() -> None:
    machine = Hardware.detect()
    assert machine.device in ("cpu", "cuda")
    assert machine.num_cpus >= 1
    assert machine.memory_bytes > 100 * 1024**2
