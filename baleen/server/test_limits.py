"""Bodies that are too large, too deep or no text, queues that are full: refused at little cost, never with a 500."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baleen.messages import EngineReady
from baleen.server.conftest import Server, running_server, wait_until
from baleen.server.errors import ApiError
from baleen.server.middleware import BodyLimit
from baleen.server.test_bad_requests import ROUTES, error_of

MOST = 20_000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("small"), max_request_body_size=MOST) as server:
        server.play("hi")
        yield server


def padded(path: str, size: int) -> bytes:
    """A valid body of exactly so many bytes."""
    body = json.dumps(ROUTES[path]).encode()
    return body + b" " * (size - len(body))


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("chunked", [False, True])
def test_one_byte_decides(small: Server, path: str, chunked: bool) -> None:
    def content(size: int) -> Any:
        data = padded(path, size)
        return (data[i : i + 7000] for i in range(0, size, 7000)) if chunked else data

    with small.http() as http:
        assert http.post(path, content=content(MOST), headers=JSON).status_code == 200
        error = error_of(http.post(path, content=content(MOST + 1), headers=JSON), 413)
        assert error["code"] == "request_too_large"
        assert str(MOST) in error["message"]
        assert "--max-request-body-size" in error["message"]
        assert http.post(path, content=content(MOST), headers=JSON).status_code == 200


def test_the_shape_of_anthropic(small: Server) -> None:
    with small.http() as http:
        answer = http.post("/v1/messages", content=b" " * (MOST + 1), headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "request_too_large"


def test_a_huge_body_is_neither_read_nor_held() -> None:
    """One that says its length is refused unread; one that does not, as soon as it is too long."""

    async def run(headers: list[tuple[bytes, bytes]]) -> tuple[int, int]:
        received = held = 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal held
            while (message := await receive()).get("more_body"):
                held += len(message["body"])

        async def receive() -> dict[str, Any]:
            nonlocal received
            received += 1000
            return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "path": "/generate", "headers": headers}
        with contextlib.suppress(ApiError):
            await BodyLimit(app, 4500)(scope, receive, send)
        return received, held

    assert asyncio.run(run([(b"content-length", b"4501")])) == (0, 0)
    assert asyncio.run(run([])) == (5000, 4000)
    assert asyncio.run(run([(b"content-length", b"10")])) == (5000, 4000)


def test_the_default_limit(server: Server) -> None:
    assert server.config.server.max_request_body_size == 64 * 2**20


BOMBS = {
    "arrays": b"[" * 100_000 + b"]" * 100_000,
    "open arrays": b"[" * 1_000_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "in a field": b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "huge integer": b'{"seed": ' + b"9" * 100_000 + b"}",
    "huge exponent": b'{"temperature": 1e999999}',
    "huge string": b'{"model": "' + b"x" * 1_000_000 + b'"}',
    "many keys": b"{" + b",".join(b'"k%d": 0' % i for i in range(50_000)) + b"}",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "x"}',
    "zero bytes": b"\0" * 100,
    "NaN": b'{"temperature": NaN}',
    "truncated": b'{"model": "x',
    "two values": b"{} {}",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("path", [*ROUTES, "/abort_request"])
def test_bombs_are_bad_requests(server: Server, path: str, bomb: str) -> None:
    with server.http() as http:
        answer = http.post(path, content=BOMBS[bomb], headers=JSON)
        assert answer.status_code in (400, 404)
        error_of(answer, answer.status_code)
        assert len(answer.content) < 2_000_000


DEEP = 150  # what the JSON reader takes


@pytest.mark.parametrize("path", ROUTES)
def test_depth_in_fields_that_take_anything(server: Server, path: str) -> None:
    deep: Any = {}
    for _ in range(DEEP):
        deep = {"a": [deep]} if len(str(deep)) % 2 else {"properties": {"a": deep}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    server.play("x")
    with server.http() as http:
        for extra in (
            {"unknown": deep},
            {"chat_template_kwargs": deep},
            {"response_format": schema},
            {"tools": [tool]},
        ):
            answer = http.post(path, json=ROUTES[path] | extra)
            assert answer.status_code in (200, 400), answer.text
            if answer.status_code == 400:
                error_of(answer, 400)


def test_the_last_of_equal_keys_counts(server: Server) -> None:
    script = server.play("x")
    body = b'{"prompt": "a", "temperature": 9, "temperature": 0.5, "prompt": "b"}'
    with server.http() as http:
        assert http.post("/v1/completions", content=body, headers=JSON).status_code == 200
    assert script.requests[0].sampling.temperature == 0.5


def test_every_503_says_when_to_come_back(tmp_path: Path) -> None:
    with running_server(tmp_path, ready=False) as server, server.http() as http:
        for path, body in ROUTES.items():
            assert http.post(path, json=body).headers["retry-after"] == "1"
        assert http.get("/health").headers["retry-after"] == "1"
        server.engine.send(EngineReady(num_pages=9, page_size=64, load_seconds=0.1))
        wait_until(lambda: http.get("/health").status_code == 200)
        assert "retry-after" not in http.post("/v1/completions", json={}).headers


def test_a_body_that_never_ends_keeps_nobody_waiting(small: Server) -> None:
    """While one client goes on sending, others are answered."""

    async def endless() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0.001)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=small.url, timeout=20) as http:
            sending = asyncio.create_task(http.post("/v1/completions", content=endless(), headers=JSON))
            for _ in range(20):
                assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    asyncio.run(run())
