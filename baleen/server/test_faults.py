"""Clients that leave, engines that die, servers that start and stop, full queues."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from baleen.messages import EngineReady, EngineStats
from baleen.server import engine_client
from baleen.server.conftest import Server, running_server, wait_until
from baleen.server.operations import PROBE_SECONDS
from baleen.server.test_bad_requests import ROUTES, error_of

HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "default", "messages": HI}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("after", ["request", "first event"])
def test_leaving_a_stream_aborts_at_once(server: Server, path: str, after: str) -> None:
    script = server.play("abc" * 60, pause=0.02, hold=after == "request")
    timeout = 0.3 if after == "request" else 20
    url, body = server.url + path, ROUTES[path] | {"stream": True}
    with contextlib.suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=timeout) as response:
        next(response.iter_bytes())
        assert after == "first event"
    wait_until(lambda: script.aborted, seconds=1.0)
    assert script.aborted == [script.requests[0].rid]
    assert server.client.num_open == 0


@pytest.mark.parametrize("path", ROUTES)
def test_leaving_a_plain_request_aborts_every_choice(server: Server, path: str) -> None:
    script = server.play("abc" * 60, pause=0.02)
    n = {"sampling_params": {"n": 2}} if path == "/generate" else {"n": 2}
    with server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post(path, json=ROUTES[path] | n, timeout=0.2)
    wait_until(lambda: len(script.aborted) == 2, seconds=1.0)
    assert sorted(script.aborted) == sorted(r.rid for r in script.requests)
    assert server.client.num_open == 0


def test_a_stream_read_to_the_end_aborts_nothing(server: Server) -> None:
    script = server.play("abc")
    list(server.openai().chat.completions.create(**CHAT, stream=True))
    server.openai().chat.completions.create(**CHAT)
    time.sleep(0.05)
    assert script.aborted == []


def start(results: dict[str, Any], name: str, function: Any) -> threading.Thread:
    def run() -> None:
        try:
            results[name] = function()
        except Exception as error:
            results[name] = error

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_dead_engine_ends_everything_with_an_error(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, server.http() as http:
        server.play("abc" * 60, pause=0.02)
        body = {"messages": HI}
        results: dict[str, Any] = {}
        threads = [
            start(results, "plain", lambda: httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20)),
            start(
                results,
                "stream",
                lambda: httpx.post(f"{server.url}/v1/chat/completions", json=body | {"stream": True}, timeout=20).text,
            ),
        ]
        wait_until(lambda: server.client.num_open == 2)
        time.sleep(0.2)
        assert http.get("/health").status_code == 200
        server.call(server.client.fail_all, "the engine process ended (signal SIGKILL)")
        for thread in threads:
            thread.join(2)
            assert not thread.is_alive()
        assert "SIGKILL" in error_of(results["plain"], 500)["message"]
        events = results["stream"].split("\n\n")
        assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert "SIGKILL" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]
        assert events[-2] == "data: [DONE]"
        for path, fields in ROUTES.items():
            assert "SIGKILL" in error_of(http.post(path, json=fields), 503)["message"]
        for path in ("/health", "/health_generate"):
            assert "SIGKILL" in error_of(http.get(path), 503)["message"]
        assert http.get("/metrics").status_code == 200
        assert http.get("/server_info").json()["status"] == "not ready"


def test_503_until_the_model_is_loaded_and_while_draining(tmp_path: Path) -> None:
    with running_server(tmp_path, ready=False) as server, server.http() as http:
        assert "loading" in error_of(http.get("/health"), 503)["message"]
        assert "loading" in error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)["message"]
        server.engine.send(EngineReady(num_pages=9, page_size=64, load_seconds=0.1))
        wait_until(lambda: http.get("/health").status_code == 200)
        server.play("abc" * 20, pause=0.01)
        results: dict[str, Any] = {}
        thread = start(results, "open", lambda: server.openai().chat.completions.create(**CHAT))
        wait_until(lambda: server.client.num_open == 1)
        server.call(server.client.start_draining)
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "shutting down" in error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)["message"]
        thread.join(10)
        assert results["open"].choices[0].message.content == "abc" * 20  # what was open went on to its end


def test_shutdown_aborts_what_is_still_open(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        server.play("abc" * 60, pause=0.02)
        results: dict[str, Any] = {}
        threads = [start(results, "running", lambda: server.openai().chat.completions.create(**CHAT))]
        wait_until(lambda: server.client.num_open == 1)
        time.sleep(0.2)
        asyncio.run_coroutine_threadsafe(server.client.shutdown_engine(), server.loop).result(5)
        threads[0].join(5)
        choice = results["running"].choices[0]
        assert choice.finish_reason == "abort"
        assert choice.message.content
        assert server.engine.shut_down.wait(5)


def test_shutdown_before_the_first_token_is_503(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        server.play("abc", hold=True)
        results: dict[str, Any] = {}
        thread = start(results, "waiting", lambda: server.openai().chat.completions.create(**CHAT, stream=True))
        wait_until(lambda: server.client.num_open == 1)
        asyncio.run_coroutine_threadsafe(server.client.shutdown_engine(), server.loop).result(5)
        thread.join(5)
        assert isinstance(results["waiting"], openai.InternalServerError)
        assert results["waiting"].status_code == 503


def test_full_queue_is_503(tmp_path: Path) -> None:
    with running_server(tmp_path, max_running_requests=2, max_queued_requests=1) as server, server.http() as http:
        script = server.play("abc", hold=True)
        results: dict[str, Any] = {}
        threads = [start(results, str(i), lambda: server.openai().chat.completions.create(**CHAT)) for i in range(3)]
        wait_until(lambda: server.client.num_open == 3)
        error = error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)
        assert error["code"] == "queue_full"
        script.hold = False
        for thread in threads:
            thread.join(5)
        assert all(r.choices[0].message.content == "abc" for r in results.values())
        server.engine.send(EngineStats(num_waiting=2))
        wait_until(lambda: http.post("/v1/completions", json={"prompt": "a"}).status_code == 503)


def test_silent_engine_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "SILENCE_SECONDS", 0.3)
    with running_server(tmp_path) as server, server.http() as http:
        script = server.play("abc", hold=True)
        time.sleep(0.4)
        assert http.get("/health").status_code == 200  # an idle engine need not speak
        results: dict[str, Any] = {}
        thread = start(results, "a", lambda: server.openai().chat.completions.create(**CHAT))
        wait_until(lambda: server.client.num_open == 1)
        assert http.get("/health").status_code == 200  # its time starts with the request
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "has said nothing" in http.get("/health").json()["error"]["message"]
        script.hold = False
        thread.join(5)
        assert http.get("/health").status_code == 200


def test_health_generate_makes_a_token_or_times_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    script = server.play("abc")
    with server.http() as http:
        assert http.get("/health_generate").status_code == 200
        assert script.requests[0].sampling.max_new_tokens == 1
        assert PROBE_SECONDS == 20.0
        monkeypatch.setattr("baleen.server.operations.PROBE_SECONDS", 0.2)
        script = server.play("abc", hold=True)
        assert "no token" in error_of(http.get("/health_generate"), 503)["message"]
        wait_until(lambda: script.aborted)
        server.play("abc", fail_after=0)
        assert "NaN" in error_of(http.get("/health_generate"), 503)["message"]


def test_unreadable_message_from_the_engine_fails_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, server.http() as http:
        server.engine.send({"type": "Nonsense"})
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "cannot read from the engine" in http.get("/health").json()["error"]["message"]
