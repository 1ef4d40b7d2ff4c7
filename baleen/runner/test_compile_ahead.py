"""Compiling ahead: the shares are the warm-up's steps, and no process that fails holds up the start or stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baleen import flags, memory_plan
from baleen.flags import default_config
from baleen.hardware import Hardware
from baleen.kernels import compile_cache
from baleen.messages import ScheduledBatch
from baleen.model.random_checkpoint import official_config, write_random_checkpoint
from baleen.runner import compile_ahead
from baleen.runner.compile_ahead import Decode, Products, cut, num_processes, run_share, run_shares, shares
from baleen.runner.model_runner import ModelRunner
from baleen.runner.warm_up import decode_shapes, prefill_steps

GIB = 1 << 30
H200 = Hardware("cuda", 128 * GIB, 16, 140 * GIB, 90, frozenset({"deep_gemm", "flash_mla", "triton"}))
MARK_OF = compile_cache.mark_of
NO_WORK = """
import os, sys, time
sys.path[:] = {path!r}
from multiprocessing.connection import Connection
connection = Connection({fd})
config = connection.recv()
connection.send(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, official_config())
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Every process that was started; none of them runs at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def recorded(*args: Any, **more: Any) -> subprocess.Popen[bytes]:
        processes.append(start(*args, **more))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    yield processes
    for process in processes:
        assert process.returncode is not None, "waited for"
        assert not running(group=process.pid)


def running(group: int) -> list[str]:
    """Processes of a group, but those that have ended and that nobody has waited for."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(path.read_text())
    return [
        s for s in stats if s.rpartition(")")[2].split()[2] == str(group) and s.rpartition(")")[2].split()[0] != "Z"
    ]


def on_cpu(folder: Path, **settings: Any) -> Any:
    sizes = {"max_total_tokens": 1024, "max_running_requests": 4, "context_length": 256, "chunked_prefill_size": 64}
    return default_config(folder, **{**sizes, **settings})


def on_gpu(folder: Path, *more: str) -> Any:
    argv = ["--model", str(folder), "--device", "cuda", "--max-running-requests", "20", "--random-seed", "1", *more]
    return flags.resolve(argv, {}, H200).config


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(compile_ahead, "_CHILD", code)


@pytest.mark.parametrize("more", [(), ("--context-length", "400"), ("--chunked-prefill-size", "128")])
def test_shares_are_all_steps_of_the_warm_up_and_all_products_once(folder: Path, more: tuple[str, ...]) -> None:
    config = on_gpu(folder, *more)
    todo = shares(cut(config))
    steps = list(prefill_steps(config, config.cache.max_total_tokens // 64))
    prefill = [share for share in todo if isinstance(share, ScheduledBatch)]
    assert sorted(prefill, key=steps.index) == steps
    chunk = max(step.rows[0].num_tokens for step in steps)
    decode = [share for share in todo if isinstance(share, Decode)]
    assert sorted(decode) == sorted(decode_shapes(config))
    products = [share for share in todo if isinstance(share, Products)]
    assert len(todo) == len(prefill) + len(decode) + len(products)
    assert [share for share in products if share.layer == "layers.1.mlp"] == [Products("layers.1.mlp", (chunk, 1))]
    sizes = {size for share in products if share.layer == "layers.0.mlp.down_proj" for size in share.sizes}
    assert sizes >= {step.rows[0].num_tokens for step in steps} | {size for size, _ in decode_shapes(config)}
    assert sizes >= {size for size in (16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 320, 896) if size <= chunk}
    assert max(sizes) == chunk
    layers = [f"self_attn.{name}" for name in ("qkv_a", "q_b", "o_proj")] + ["mlp.gate_up", "mlp.down_proj"]
    linear = [share for share in products if share.layer != "layers.1.mlp"]
    assert sorted((share.layer, size) for share in linear for size in share.sizes) == sorted(
        (f"layers.0.{layer}", size) for layer in layers for size in sizes
    )
    assert {type(share) for share in todo[:3]} == {ScheduledBatch, Products, Decode}, "each kind begins at once"
    assert todo[0] == max(steps, key=lambda step: step.rows[0].num_tokens)


@pytest.mark.parametrize(
    ("num_layers", "first_moe", "kept"),
    [(6, 1, (2, 1)), (6, 3, (2, 1)), (4, 0, (1, 0)), (2, 2, (1, 1)), (1, 3, (1, 1))],
)
def test_the_cut_model_has_a_layer_of_each_kind_and_every_dimension(
    folder: Path, num_layers: int, first_moe: int, kept: tuple[int, int]
) -> None:
    config = on_gpu(folder)
    model = replace(config.model, num_hidden_layers=num_layers, first_k_dense_replace=first_moe)
    small = cut(replace(config, model=model))
    assert (small.model.num_hidden_layers, small.model.first_k_dense_replace) == kept
    kinds = {small.model.is_moe_layer(layer) for layer in range(small.model.num_hidden_layers)}
    assert kinds == {model.is_moe_layer(layer) for layer in range(num_layers)}
    names = ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers")
    assert replace(small.model, **{name: getattr(model, name) for name in names}) == model
    assert small.load.load_format == "dummy"
    assert (small.attention, small.load.context_length) == (config.attention, config.load.context_length)
    assert small.scheduler.max_running_requests == 20
    assert small.cache.max_total_tokens < config.cache.max_total_tokens


def test_processes_fit_into_cores_shares_and_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = cut(on_gpu(folder))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    each = memory_plan.plan(small, 0).total + compile_ahead.CONTEXT_BYTES
    assert num_processes(small, 30, 1000 * GIB) == 16
    assert num_processes(small, 5, 1000 * GIB) == 5
    assert num_processes(small, 30, 4 * each) == 3, "a tenth of it stays free"
    assert num_processes(small, 30, each) == 0


def test_every_share_is_done_once_and_counted(
    folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    small = cut(on_gpu(folder))
    todo = shares(small)
    log = tmp_path / "log"
    take = f"log = os.open({str(log)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)\nwhile True:\n"
    stand_in(monkeypatch, NO_WORK + take + "    os.write(log, b'%a\\n' % (connection.recv(),)); connection.send(1)")
    run_shares(small, todo, 3, progress=True)
    assert sorted(log.read_text().splitlines()) == sorted(ascii(share) for share in todo)
    assert len(started) == 3
    assert f"{len(todo)}/{len(todo)}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit('no such GPU')", "3 of 3 processes, the start takes longer: no such GPU"),
        (NO_WORK + "connection.recv(); os.kill(os.getpid(), 11)", "3 of 3 processes, the start takes longer: it wrote"),
        (NO_WORK + "time.sleep(60)", "no step was done for 1 s"),
        ("import subprocess; subprocess.run(['sleep', '60'])", "no step was done for 1 s"),
    ],
)
def test_processes_that_fail_end_and_the_start_goes_on(
    folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: Any, code: str, told: str
) -> None:
    stand_in(monkeypatch, code)
    monkeypatch.setattr(compile_ahead, "STALL_SECONDS", 1.0 if "1 s" in told else 30.0)
    small = cut(on_gpu(folder))
    run_shares(small, shares(small), 3)
    assert len(started) == 3
    err = capfd.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_one_that_never_starts_is_not_waited_for(
    folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    first = f"import os, time\ntry: os.mkdir({str(tmp_path / 'first')!r})\nexcept OSError: time.sleep(600)\n"
    stand_in(monkeypatch, first + NO_WORK + "while True: connection.recv(); connection.send(1)")
    small = cut(on_gpu(folder))
    todo = shares(small)
    run_shares(small, todo, 2, progress=True)
    err = capfd.readouterr().err
    assert f"{len(todo)}/{len(todo)}" in err
    assert "warning" not in err


def test_no_interpreter_and_an_interrupt(
    folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    small = cut(on_gpu(folder))
    stand_in(monkeypatch, NO_WORK + "time.sleep(60)")
    wait = compile_ahead.wait

    def interrupted(*args: Any) -> Any:
        wait(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compile_ahead, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_shares(small, shares(small), 2)
    assert len(started) == 2
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    run_shares(small, shares(small), 2)
    assert "No such file" in capfd.readouterr().err


def test_two_real_processes_on_a_cpu(folder: Path, started: list[Any], capfd: Any) -> None:
    small = cut(on_cpu(folder))
    todo = shares(small)
    assert len(todo) == 4
    run_shares(small, [*todo, Products("layers.1.self_attn.q_b", (3, 5))], 2, progress=True)
    err = capfd.readouterr().err
    assert "5/5" in err
    assert "warning" not in err
    assert len(started) == 2


def test_a_killed_parent_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    code = """
import sys, time
from baleen.flags import default_config
from baleen.runner.compile_ahead import _Worker, cut
worker = _Worker(cut(default_config(sys.argv[1], max_total_tokens=128, context_length=128, max_running_requests=1)))
worker.connection.recv()
print(worker._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert running(child)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)


def test_products_run_with_every_kernel_and_steps_leave_them_to_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = cut(on_cpu(folder))
    runner = ModelRunner(small)
    used: list[Any] = []
    monkeypatch.setattr(compile_ahead, "use_kernels", lambda attention, **pinned: used.append(pinned))
    sizes: list[int] = []
    runner.model.get_submodule("layers.0.mlp.gate_up").register_forward_hook(lambda *seen: sizes.append(len(seen[2])))
    run_share(runner, small, Products("layers.0.mlp.gate_up", (3, 40)))
    run_share(runner, small, next(iter(prefill_steps(small, 4))))
    assert sizes == [3, 40, 16]
    runner.model.get_submodule("layers.1.mlp").register_forward_hook(lambda *seen: sizes.append(len(seen[2])))
    run_share(runner, small, Products("layers.1.mlp", (50, 1)))
    assert sizes == [3, 40, 16, 50, 1]
    assert used == [{}, {"fp8_gemm": "reference"}, {}]


@pytest.mark.gpu
def test_every_share_runs_on_a_gpu(tmp_path: Path, started: list[Any], capfd: Any) -> None:
    """Products, prefill in two chunks and decode; and their memory is free afterwards."""
    sizes = {"hidden_size": 512, "num_attention_heads": 64, "index_n_heads": 64, "intermediate_size": 1024}
    write_random_checkpoint(tmp_path / "model", official_config(**sizes))
    settings = {"max_total_tokens": 2048, "max_running_requests": 2, "context_length": 600, "chunked_prefill_size": 512}
    small = cut(default_config(tmp_path / "model", device="cuda", **settings))
    todo = shares(small)
    assert {type(share) for share in todo} == {Products, ScheduledBatch, Decode}
    free = torch.cuda.mem_get_info()[0]
    run_shares(small, todo, 2, progress=True)
    err = capfd.readouterr().err
    assert "warning" not in err
    assert f"{len(todo)}/{len(todo)}" in err
    assert torch.cuda.mem_get_info()[0] > free - 2**28


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stands in for a GPU with memory and for Triton; the calls of `run_shares`."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(compile_ahead, "run_shares", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(
        compile_cache, "mark_of", lambda settings: tmp_path / f"mark-{compile_cache.fingerprint(settings)}"
    )
    return calls


def test_what_is_marked_is_not_compiled_again(folder: Path, gpu: list[Any]) -> None:
    config = on_gpu(folder)
    for _ in range(2):  # the second time, since the warm-up has not run
        mark = compile_ahead.compile_ahead(config)
    assert len(gpu) == 2
    compile_ahead.remember(mark)
    assert compile_ahead.compile_ahead(config) is None
    assert compile_ahead.compile_ahead(on_gpu(folder, "--random-seed", "2", "--port", "1234")) is None
    assert len(gpu) == 2
    others = [
        ("--max-running-requests", "32"), ("--kv-cache-dtype", "fp8_e4m3"), ("--context-length", "4000"),
        ("--chunked-prefill-size", "512"), ("--disable-cuda-graph",), ("--dsa-topk-backend", "reference"),
        ("--json-model-override-args", '{"hidden_size": 384}'), ("--cuda-graph-max-bs-decode", "8"),
    ]  # fmt: skip
    for number, more in enumerate(others, 3):
        compile_ahead.remember(compile_ahead.compile_ahead(on_gpu(folder, *more)))
        assert len(gpu) == number, more
    compile_ahead.remember(None)
    compile_ahead.remember(Path("/nowhere/mark"))


def test_where_nothing_is_compiled_ahead(folder: Path, gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_ahead.compile_ahead(on_cpu(folder)) is None
    assert compile_ahead.compile_ahead(on_gpu(folder, "--kernels", "reference")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 140 * GIB))
    assert compile_ahead.compile_ahead(on_gpu(folder)) is not None, "no room, but the warm-up compiles it all"
    assert gpu == []


def test_without_triton_nothing_is_marked(folder: Path, gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "mark_of", MARK_OF)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compile_ahead.compile_ahead(on_gpu(folder)) is None
    assert gpu == []
