"""`baleen bench batch` on a tiny model, and the steps it makes of a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baleen.__main__ import command
from baleen.bench.batch import _decode, _prefill
from baleen.model.random_checkpoint import SIZES, official_config


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(official_config(**SIZES["tiny"])))
    return str(path)


def test_a_table_and_a_line_of_json_for_each_batch(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    line = [
        "bench",
        "batch",
        "--config-only",
        config,
        "--batch-size",
        "1",
        "3",
        "--input-len",
        "70",
        "--output-len",
        "3",
    ]
    assert command([*line, "--result-filename", str(out), "--chunked-prefill-size", "128"], {}) == 0
    results = [json.loads(text) for text in out.read_text().splitlines()]
    assert [(r["batch_size"], r["input_len"], r["output_len"]) for r in results] == [(1, 70, 3), (3, 70, 3)]
    for result in results:
        assert result["prefill_tokens_per_s"] == pytest.approx(
            result["batch_size"] * 70 / (result["prefill_ms"] / 1000), rel=1e-6
        )
        assert min(result["decode_ms"], result["decode_overlapped_ms"]) > 0
        assert 0 < result["decode_start_ms"] <= result["decode_ms"]
    shown = capsys.readouterr()
    assert "prefill tok/s" in shown.out
    assert "memory plan:" in shown.err


def test_decode_without_prefill_is_over_a_cache_of_random_tokens(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    line = f"bench batch --config-only {config} --batch-size 2 --input-len 130 --output-len 3 --skip-prefill"
    assert command([*line.split(), "--result-filename", str(out)], {}) == 0
    result = json.loads(out.read_text())
    assert result["prefill_ms"] is None
    assert result["prefill_tokens_per_s"] is None
    assert result["decode_ms"] > 0
    assert "    -" in capsys.readouterr().out


def test_a_step_without_prefill_computes_the_last_token_of_each_prompt() -> None:
    (step,) = _prefill([(7,), (9,)], 70, 2, 66)
    assert [(row.slot, row.start, row.token_ids, row.sample) for row in step.rows] == [
        (0, 66, (7,), True),
        (1, 66, (9,), True),
    ]
    assert [row.open and (row.open.pages, row.open.num_prompt) for row in step.rows] == [((1, 2), 67), ((3, 4), 67)]


def test_a_profile_of_a_prefill_and_of_a_decode_step(config: str, tmp_path: Path) -> None:
    line = f"bench batch --config-only {config} --batch-size 2 --input-len 70 --output-len 4 --profile"
    assert command([*line.split(), "--profile-filename-prefix", str(tmp_path / "p")], {}) == 0
    assert sorted(path.name for path in tmp_path.glob("p_*")) == ["p_decode_B2.txt", "p_prefill_B2.txt"]
    text = (tmp_path / "p_prefill_B2.txt").read_text()
    assert text.startswith("prefill step of 140 tokens, batch of 2, 70 in\n")
    assert "  us      %  calls  kernel" in text


def test_what_does_not_fit_is_left_out(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"bench batch --config-only {config} --batch-size 1 4 --input-len 70 --output-len 2 --max-total-tokens 128"
    assert command(line.split(), {}) == 0
    shown = capsys.readouterr()
    assert "batch of 4, 70 in, 2 out: left out, needs 512 cached tokens, and there is room for 128" in shown.err
    assert len([text for text in shown.out.splitlines() if text.startswith("{")]) == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--output-len 1", "--output-len: is too small"),
        ("--batch-size 0", "--batch-size: is too small"),
        ("--no-such-flag", "--no-such-flag: unknown flag"),
    ],
)
def test_refused(config: str, line: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "batch", "--config-only", config, *line.split()], {}) == 2
    assert text in capsys.readouterr().err


def test_what_cannot_run_here_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "batch", "--config-only", config, "--tp", "2"], {}) == 2
    assert "--tp 2: needs tensor parallelism" in capsys.readouterr().err


def test_prefill_computes_every_token_once_in_full_steps() -> None:
    prompts = [tuple(range(10 * r, 10 * r + 7)) for r in range(4)]
    steps = list(_prefill(prompts, 10, 10))
    assert [sum(row.num_tokens for row in step.rows) for step in steps] == [10, 10, 8]
    seen: dict[int, tuple[int, ...]] = {}
    for step in steps:
        lengths = [row.num_tokens for row in step.rows]
        assert lengths == sorted(lengths, key=lambda n: n > 1), "rows of one token come first"
        for row in step.rows:
            assert row.start == len(seen.get(row.slot, ()))
            assert (row.open is not None) == (row.start == 0)
            seen[row.slot] = seen.get(row.slot, ()) + row.token_ids
            assert row.sample == (len(seen[row.slot]) == 7)
    assert [seen[slot] for slot in range(4)] == prompts
    pages = [row.open.pages for step in steps for row in step.rows if row.open]
    assert sorted(page for own in pages for page in own) == [1, 2, 3, 4]
    assert [[row.start for row in step.rows] for step in _decode(2, 7, 3)] == [[7, 7], [8, 8]]
