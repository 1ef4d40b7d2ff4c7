"""The small routes, the metrics, and what the checkpoint's files decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baleen.chat.tokenizer import Tokenizer
from baleen.config import ConfigError
from baleen.messages import CacheFlushed, EngineStats
from baleen.server.app import create_app
from baleen.server.conftest import CONTEXT, Server, make_config, running_server, wait_until
from baleen.server.engine_client import EngineClient
from baleen.server.fields import read_sampling_defaults

HI = [{"role": "user", "content": "hi"}]


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny-whale"
            if "le" not in sample.labels:
                found[sample.name] = sample.value
    return found


def test_models(server: Server) -> None:
    (card,) = server.openai().models.list().data
    assert (card.id, card.max_model_len) == ("tiny-whale", CONTEXT)
    assert server.openai().models.retrieve("tiny-whale").id == "tiny-whale"


def test_infos_have_the_keys_that_sglang_clients_read(server: Server) -> None:
    server.engine.send(
        EngineStats(num_pages=10, num_free_pages=4, num_cached_pages=3, num_evictable_pages=1, num_running=2)
    )
    wait_until(lambda: server.client.stats.num_running == 2)
    with server.http() as http:
        info = http.get("/server_info").json()
        assert http.get("/get_server_info").json()["served_model_name"] == "tiny-whale"
        model = http.get("/model_info").json()
        assert http.get("/get_model_info").json() == model
    assert info["page_size"] == 64
    assert info["tp_size"] == info["dp_size"] == 1
    assert info["disaggregation_mode"] == "null"
    assert info["disable_radix_cache"] is False
    assert info["max_req_input_len"] == CONTEXT - 1
    assert info["internal_states"][0]["num_running"] == 2
    assert info["internal_states"][0]["token_usage"] == 0.5
    assert "api_key" not in info
    assert model["is_generation"] is True
    assert model["model_path"] == info["model_path"]


def test_metrics_count_requests(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, server.http() as http:
        server.play("abcd")
        client = server.openai()
        client.chat.completions.create(model="default", messages=HI)
        prompt = client.chat.completions.create(model="default", messages=HI, n=2).usage.prompt_tokens
        script = server.play("abcd" * 40, pause=0.01)
        stream = client.chat.completions.create(model="default", messages=HI, stream=True, max_tokens=100)
        next(stream)
        stream.close()
        wait_until(lambda: script.aborted)
        http.get("/health_generate")
        server.engine.send(
            EngineStats(
                num_running=3,
                num_waiting=4,
                num_pages=100,
                num_free_pages=30,
                num_cached_pages=25,
                num_evictable_pages=20,
                num_prompt_tokens_total=200,
                num_cached_tokens_total=50,
            )
        )
        wait_until(lambda: server.client.stats.num_waiting == 4)
        found = samples(http.get("/metrics").text)
    assert found["sglang:num_running_reqs"] == 3
    assert found["sglang:num_queue_reqs"] == 4
    assert found["sglang:token_usage"] == 0.5
    assert found["sglang:cache_hit_rate"] == 0.25
    assert found["sglang:num_requests_total"] == 4
    assert found["sglang:num_aborted_requests_total"] == 1
    assert found["sglang:prompt_tokens_total"] == 3 * prompt
    assert found["sglang:cached_tokens_total"] == 3 * 3
    assert 3 * 5 < found["sglang:generation_tokens_total"] < 3 * 5 + 100
    assert found["sglang:time_to_first_token_seconds_count"] == 4
    assert found["sglang:e2e_request_latency_seconds_count"] == 3
    tokens_after_first = found["sglang:generation_tokens_total"] - 4
    assert found["sglang:inter_token_latency_seconds_count"] == tokens_after_first


def test_flush_cache(server: Server) -> None:
    with server.http() as http:
        server.play()
        assert http.post("/flush_cache").text.startswith("Cache flushed.")
        server.play(flush_answer=CacheFlushed(False, "3 requests are running"))
        refused = http.get("/flush_cache")
    assert refused.status_code == 400
    assert "3 requests are running" in refused.json()["error"]["message"]


def test_generation_config_gives_chat_its_defaults(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "do_sample": True, "eos_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with running_server(tmp_path) as server:
        script = server.play("x")
        client = server.openai()
        client.chat.completions.create(model="default", messages=HI)
        client.chat.completions.create(model="default", messages=HI, temperature=0, top_p=1)
        client.completions.create(model="default", prompt="a")
    chosen = [(r.sampling.temperature, r.sampling.top_p) for r in script.requests]
    assert chosen == [(0.6, 0.95), (0.0, 1.0), (1.0, 1.0)]
    assert {r.sampling.top_k for r in script.requests} == {-1}  # 0 is transformers' way to say all tokens


def test_api_processes_draw_other_seeds(tmp_path: Path) -> None:
    """Else two requests without a seed, at two processes, would get the same answer."""
    config = make_config(tmp_path)

    def seeds(process: int) -> list[int]:
        app = create_app(config, EngineClient("", process), Tokenizer.load(config))
        return [app.state.service.seed(None, 0) for _ in range(3)]

    assert seeds(0) == seeds(0)
    assert not set(seeds(0)) & set(seeds(1))


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    """`do_sample: false` is transformers' way to say so; a temperature beside it stands."""
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": false}')
    assert read_sampling_defaults(str(tmp_path)) == {"temperature": 0.0}
    path.write_text('{"do_sample": false, "temperature": 0.6}')
    assert read_sampling_defaults(str(tmp_path)) == {"temperature": 0.6}
    path.write_text('{"do_sample": true}')
    assert read_sampling_defaults(str(tmp_path)) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "warm"}', '{"top_p": 7}'])
def test_broken_generation_config_is_refused_at_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        create_app(config, EngineClient(""), Tokenizer.load(config))


def test_drawn_seeds_follow_random_seed(tmp_path: Path) -> None:
    seeds = []
    for name, random_seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        with running_server(tmp_path / name, random_seed=random_seed) as server:
            script = server.play("x")
            server.openai().completions.create(model="default", prompt="a", n=2)
            seeds.append([r.sampling.seed for r in script.requests])
    assert seeds[0] == seeds[1] != seeds[2]
