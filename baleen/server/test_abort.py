"""`rid` and POST /abort_request: requests are found by the name their client gave, and end with what they have."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from baleen.messages import TokenOutput, TokenOutputs
from baleen.server.conftest import Server, wait_until
from baleen.server.test_bad_requests import ROUTES, error_of

LONG = "abc" * 60


class Call(threading.Thread):
    def __init__(self, server: Server, path: str, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.url, self.body = server.url + path, ROUTES[path] | fields
        self.before = server.client.num_open
        self.server = server
        self.start()

    def run(self) -> None:
        self.answer = httpx.post(self.url, json=self.body, timeout=20)

    def is_open(self, count: int = 1) -> Call:
        wait_until(lambda: self.server.client.num_open == self.before + count)
        return self

    def result(self) -> httpx.Response:
        self.join(10)
        assert not self.is_alive()
        return self.answer


def abort(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/abort_request", json=body)


def reasons(path: str, answer: httpx.Response) -> list[str]:
    """The finish_reason of each choice."""
    assert answer.status_code == 200, answer.text
    data = answer.json()
    if path == "/generate":
        parts = data if isinstance(data, list) else [data]
        return [part["meta_info"]["finish_reason"]["type"] for part in parts]
    return [choice["finish_reason"] for choice in data["choices"]]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("after", [0, 10])
def test_an_aborted_request_is_answered_with_what_it_has(server: Server, path: str, after: int) -> None:
    script = server.play(LONG, pause=0.01, hold=after == 0)
    limit = {"sampling_params": {"max_new_tokens": 150}} if path == "/generate" else {"max_tokens": 150}
    call = Call(server, path, rid="mine", **limit).is_open()
    wait_until(lambda: script.requests)
    assert script.requests[0].rid == "mine"
    if after:
        wait_until(lambda: server.engine.said("mine") > after)
    answer = abort(server, rid="mine")
    assert (answer.status_code, answer.content) == (200, b"")
    assert reasons(path, call.result()) == ["abort"]
    data = call.answer.json()
    text = data["text"] if path == "/generate" else str(data["choices"][0])
    assert ("abca" in text) == (after > 0)
    assert script.aborted == ["mine"]
    assert server.client.num_open == 0


@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/generate"])
def test_the_id_of_an_answer_is_its_name(server: Server, path: str) -> None:
    """A client that gave no `rid` aborts by the id it was told."""
    server.play(LONG, pause=0.01)
    body = ROUTES[path] | {"stream": True, "max_tokens": 150}
    with server.http() as http, http.stream("POST", path, json=body) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        name = json.loads(next(lines))["id"]
        abort(server, rid=name)
        *events, done = lines
    assert done == "[DONE]"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("path", ROUTES)
def test_an_aborted_stream_ends_in_order(server: Server, path: str) -> None:
    script = server.play(LONG, pause=0.01)
    limit = {"sampling_params": {"max_new_tokens": 150}} if path == "/generate" else {"max_tokens": 150}
    call = Call(server, path, rid="mine", stream=True, **limit).is_open()
    wait_until(lambda: script.requests)
    abort(server, rid="mine")
    events = call.result().text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert "abort" in str(last)
    assert "error" not in last


def test_the_name_is_a_beginning(server: Server) -> None:
    """As in SGLang: of the requests named here, and of the choices of one."""
    server.play(LONG, hold=True)
    job = Call(server, "/v1/completions", rid="job", n=2).is_open(2)
    job2 = Call(server, "/generate", rid="job-2").is_open()
    other = Call(server, "/generate", rid="other").is_open()
    wait_until(lambda: len(server.script.requests) == 4)
    assert sorted(r.rid for r in server.script.requests) == ["job-2", "job_0", "job_1", "other"]
    abort(server, rid="job_1")
    wait_until(lambda: server.client.num_open == 3)
    abort(server, rid="job")
    assert reasons("/v1/completions", job.result()) == ["abort", "abort"]
    assert reasons("/generate", job2.result()) == ["abort"]
    assert server.client.num_open == 1
    abort(server, rid="nobody")
    abort(server, abort_all=True)
    assert reasons("/generate", other.result()) == ["abort"]


@pytest.mark.parametrize("body", [{}, {"rid": ""}, {"rid": None, "abort_all": False}, {"rid": 5}, {"abort_all": "yes"}])
def test_what_names_nothing_is_refused(server: Server, body: dict[str, Any]) -> None:
    error = error_of(abort(server, **body), 400)
    assert error["param"] in ("rid", "abort_all")


def test_a_name_in_use_is_refused_and_free_again_at_the_end(server: Server) -> None:
    server.play(LONG, hold=True)
    first = Call(server, "/v1/completions", rid="mine").is_open()
    for path in ROUTES:
        error = error_of(httpx.post(server.url + path, json=ROUTES[path] | {"rid": "mine"}), 400)
        assert (error["param"], error["code"]) == ("rid", "duplicate_request_id")
    assert len(server.script.requests) == 1
    abort(server, rid="mine")
    first.result()
    server.play("xyz")
    for _ in range(3):
        again = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "rid": "mine"})
        assert again.json()["choices"][0]["text"] == "xyz"


def test_a_name_used_again_at_once_gets_its_own_tokens(server: Server) -> None:
    """A client leaves and comes back under the same name while tokens of the first request are still on their way."""
    server.play(LONG, hold=True)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "rid": "mine"}, timeout=0.3)
    wait_until(lambda: server.script.aborted)
    server.play("xyz", hold=True)
    call = Call(server, "/v1/completions", rid="mine").is_open()
    server.client._leaving["mine"] += 1  # as if the abort were not confirmed yet
    wait_until(lambda: server.script.requests)

    def stale(reason: Any = None) -> TokenOutput:
        ids = tuple(server.tokenizer.encode("no"))
        totals = {"num_prompt_tokens": 1, "num_cached_tokens": 0, "num_output_tokens": 9}
        return TokenOutput(rid="mine", token_ids=ids, finish_reason=reason, **totals)

    server.engine.send(TokenOutputs((stale(), stale())))
    server.engine.send(TokenOutputs((stale("abort"),)))
    wait_until(lambda: not server.client._leaving)
    server.script.hold = False
    assert call.result().json()["choices"][0]["text"] == "xyz"


@pytest.mark.parametrize("rid", ["x" * 257, 5, ["a", "b"]])
def test_a_name_that_cannot_be_one(server: Server, rid: Any) -> None:
    for path in ROUTES:
        error = error_of(httpx.post(server.url + path, json=ROUTES[path] | {"rid": rid}), 400)
        assert error["param"].startswith("rid")


def test_an_abort_of_all_leaves_the_server_healthy(server: Server) -> None:
    server.play("x", hold=True)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(httpx.get(f"{server.url}/health_generate", timeout=20)))
    thread.start()
    wait_until(lambda: server.script.requests)
    abort(server, abort_all=True)
    thread.join(10)
    assert answers[0].status_code == 200


def test_what_the_engine_refuses_is_the_users_to_mend(server: Server) -> None:
    """An error of the engine has the status it comes with."""
    server.play("x", hold=True)
    for status, code in ((400, "invalid_request"), (503, "engine_unavailable"), (500, "engine_error")):
        call = Call(server, "/v1/chat/completions", rid=f"r{status}").is_open()
        totals = {"num_prompt_tokens": 1, "num_cached_tokens": 0, "num_output_tokens": 0}
        error = TokenOutput(
            rid=f"r{status}", token_ids=(), finish_reason="error", message="regex: no", status=status, **totals
        )
        server.engine.send(TokenOutputs((error,)))
        found = error_of(call.result(), status)
        assert (found["message"], found["code"]) == ("regex: no", code)
    abort(server, abort_all=True)
    wait_until(lambda: server.engine.idle)


def test_open_sequences_are_counted(server: Server) -> None:
    """What the queue limit goes by: as many open as there are, however they end."""
    metrics = server.app.state.service.metrics
    server.play(LONG, hold=True)
    calls = [Call(server, path, rid="a").is_open() for path in ("/generate",)]
    wait_until(lambda: metrics.open_sequences.total() == 1)  # counted a moment after the client has it
    calls.append(Call(server, "/v1/completions", n=3).is_open(3))
    wait_until(lambda: metrics.open_sequences.total() == 4)
    abort(server, rid="a")
    calls[0].result()
    wait_until(lambda: metrics.open_sequences.total() == 3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json={"text": "x"}, timeout=0.3)
    server.script.hold = False
    calls[1].result()
    wait_until(lambda: metrics.open_sequences.total() == 0)
