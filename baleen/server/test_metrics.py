"""The names and numbers of /metrics: what gateways and dashboards read, and the sums over API processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baleen.messages import QUEUE_SECONDS, EngineStats
from baleen.server.conftest import Server, running_server, wait_until
from baleen.server.shared_counters import COLUMNS, Counter, Histogram, SharedCounters

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path) as server:
        yield server


def scrape(server: Server) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """sample name -> labels -> value."""
    with server.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def value(found: dict[str, Any], name: str, **labels: str) -> float:
    want = {"model_name": "tiny-whale", "engine_type": "unified", **labels}.items()
    (only,) = [value for have, value in found[name].items() if want <= set(have)]
    return float(only)


def test_gauges_of_the_engine(fresh: Server) -> None:
    stats = EngineStats(
        num_running=3,
        num_waiting=4,
        num_retracted=1,
        num_decoding_tokens=77,
        num_pages=100,
        num_free_pages=30,
        num_cached_pages=25,
        num_evictable_pages=20,
        num_evicted_pages_total=2,
        num_prompt_tokens_total=200,
        num_cached_tokens_total=50,
        num_generated_tokens_total=900,
        num_retractions_total=6,
        num_timeouts_total=5,
        num_steps_total=11,
        forward_seconds_total=1.5,
        queue_seconds_total=12.5,
        num_grammar_queue=7,
        num_grammar_compiled_total=8,
        num_grammar_failed_total=9,
        grammar_wait_seconds_total=0.25,
        queue_counts_total=(2, 3, *[0] * (len(QUEUE_SECONDS) - 2), 4),
    )
    fresh.engine.send(stats)
    wait_until(lambda: fresh.client.stats == stats)
    found = scrape(fresh)
    expected = {
        "sglang:num_running_reqs": 3,
        "sglang:num_queue_reqs": 4,
        "sglang:num_retracted_reqs": 1,
        "sglang:num_grammar_queue_reqs": 7,
        "sglang:num_grammar_total": 8,
        "sglang:num_grammar_aborted_total": 9,
        "sglang:grammar_wait_seconds_total": 0.25,
        "sglang:token_usage": 0.5,
        "sglang:cache_hit_rate": 0.25,
        "sglang:decode_sum_seq_lens": 77,
        "sglang:num_used_tokens": 50 * 64,
        "sglang:kv_used_tokens": 50 * 64,
        "sglang:kv_available_tokens": 30 * 64,
        "sglang:kv_evictable_tokens": 20 * 64,
        "sglang:max_total_num_tokens": 4096,
        "sglang:num_pages": 100,
        "sglang:page_size": 64,
        "sglang:context_len": 256,
        "sglang:engine_load_weights_time": 1.5,
        "sglang:num_retracted_requests_total": 6,
        "sglang:num_timeouts_total": 5,
        "sglang:num_steps_total": 11,
        "sglang:evicted_tokens_total": 128,
        "sglang:forward_execution_seconds_total": 1.5,
        "sglang:queue_time_seconds_count": 9,
        "sglang:queue_time_seconds_sum": 12.5,
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.5,
    }
    assert {name: value(found, name) for name in expected} == expected
    assert value(found, "sglang:queue_time_seconds_bucket", le="0.1") == 2
    assert value(found, "sglang:queue_time_seconds_bucket", le="0.2") == 5
    assert value(found, "sglang:queue_time_seconds_bucket", le="3000.0") == 5
    assert value(found, "sglang:queue_time_seconds_bucket", le="+Inf") == 9
    for mode, count in (("prefill_compute", 150), ("prefill_cache", 50), ("decode", 900)):
        assert value(found, "sglang:realtime_tokens_total", mode=mode) == count


def test_throughput_is_of_late(fresh: Server) -> None:
    client = fresh.client
    client._measured = (client._measured[0] - 2.0, 100)
    client._measure(EngineStats(num_generated_tokens_total=300))
    assert 60 < client.throughput <= 100
    before = client.throughput
    client._measure(EngineStats(num_generated_tokens_total=900))
    assert client.throughput == before, "less than a second is no measure"
    client._measured = (client._measured[0] - 2.0, 300)
    client._measure(EngineStats(num_generated_tokens_total=300))
    assert client.throughput == 0.0
    assert value(scrape(fresh), "sglang:gen_throughput") == 0.0


def test_lengths_of_requests(fresh: Server) -> None:
    fresh.play("abc" * 20)
    with fresh.http() as http:
        for length, answer in ((20, 12), (20, 12), (50, 1)):
            body = {"prompt": [7] * length, "max_tokens": answer}
            assert http.post("/v1/completions", json=body).status_code == 200
    found = scrape(fresh)
    assert value(found, "sglang:prompt_tokens_histogram_sum") == 90
    assert value(found, "sglang:prompt_tokens_histogram_bucket", le="30.0") == 2
    assert value(found, "sglang:prompt_tokens_histogram_bucket", le="100.0") == 3
    assert value(found, "sglang:uncached_prompt_tokens_histogram_sum") == 90 - 3 * 3
    assert value(found, "sglang:generation_tokens_histogram_sum") == 25
    assert value(found, "sglang:generation_tokens_histogram_bucket", le="10.0") == 1


def test_http_by_route_and_status(fresh: Server) -> None:
    with fresh.http() as http:
        http.get("/v1/models")
        http.get("/v1/models/tiny-whale")
        http.get("/v1/models/nothing/at/all")
        http.post("/v1/completions", json={})
        for i in range(3):
            http.get(f"/made/up/{i}")
        http.delete("/health")
    found = scrape(fresh)

    def responses(endpoint: str, method: str, status: int) -> float:
        return value(found, "sglang:http_responses_total", endpoint=endpoint, method=method, status_code=str(status))

    assert responses("/v1/models", "GET", 200) == 1
    assert responses("/v1/models/{name:path}", "GET", 200) == 1
    assert responses("/v1/models/{name:path}", "GET", 404) == 1
    assert responses("/v1/completions", "POST", 400) == 1
    assert responses("other", "other", 404) == 3
    assert responses("other", "other", 405) == 1
    assert value(found, "sglang:http_requests_total", endpoint="other", method="other") == 4
    assert value(found, "sglang:http_requests_active") == 1  # this one
    text = str(found["sglang:http_requests_total"])
    assert "made" not in text, "anybody could fill the memory with labels"


def test_a_handler_that_fails_is_a_500(fresh: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(fresh.app.state.service), "check_model", broken)
    with fresh.http() as http:
        assert http.get("/v1/models/x").status_code == 500
    found = scrape(fresh)
    assert value(found, "sglang:http_responses_total", endpoint="/v1/models/{name:path}", status_code="500") == 1
    assert value(found, "sglang:http_requests_active") == 1


# ---- several processes


def test_totals_are_sums_of_rows_and_survive_a_process(tmp_path: Path) -> None:
    def process(row: int) -> tuple[Counter, Histogram, Counter]:
        counters = SharedCounters(tmp_path / "counters", row=row, num_rows=2)
        return Counter(counters), Histogram(counters, (1.0, 2.0)), Counter(counters)

    first, second = process(0), process(1)
    first[0].inc()
    second[0].inc(4)
    for values, (_, histogram, gauge) in (((0.5, 1.0, 1.5), first), ((2.0, 99.0), second)):
        gauge.inc(3)
        for number in values:
            histogram.observe(number)
    second[1].observe(1.2, 10)
    for counter, histogram, gauge in (first, second):
        assert counter.total() == 5
        assert histogram.total() == ([2, 12, 1], 0.5 + 1.0 + 1.5 + 2.0 + 99.0 + 12.0)
        assert gauge.total() == 6
    successor = process(1)
    successor[2].reset()
    assert (first[0].total(), first[2].total()) == (5, 3)
    successor[0].inc()
    assert first[0].total() == 6


def test_there_is_room_for_all_columns(fresh: Server) -> None:
    assert fresh.app.state.service.metrics._counters._num_columns < COLUMNS // 2


# ---- what the docs say


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:sglang|vllm):[a-z0-9_]+", text))


def exposed(server: Server) -> set[str]:
    """Families and samples; a labelled family shows none before it has counted."""
    with server.http() as http:
        text = http.get("/metrics").text
    return set(scrape(server)) | names_in(text)


def test_the_dashboard_can_be_imported_and_every_name_in_it_exists(fresh: Server) -> None:
    dashboard = json.loads((DOCS / "grafana" / "baleen.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    known = exposed(fresh)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"]
        for target in panel["targets"]:
            expression = target["expr"]
            assert names_in(expression), expression
            assert names_in(expression) <= known
            for pair in ("()", "{}", "[]"):
                assert expression.count(pair[0]) == expression.count(pair[1]), expression
            used = set(re.findall(r"\$\{?([a-z_]+)", expression.replace("$__rate_interval", "")))
            assert used <= variables
    queries = " ".join(v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query")
    assert names_in(queries) <= known


def test_the_list_in_the_docs_is_what_there_is(fresh: Server) -> None:
    with fresh.http() as http:
        families = set(re.findall(r"^# TYPE (\S+)", http.get("/metrics").text, re.MULTILINE))
    assert names_in((DOCS / "metrics.md").read_text()) == families
