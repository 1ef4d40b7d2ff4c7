"""--api-key: who gets in, and that the key is told to nobody. Cross-origin rules, which must not stand in its way."""

from __future__ import annotations

import hmac
from collections.abc import Iterator

import httpx
import openai
import pytest

from baleen.server.app import ROUTES
from baleen.server.conftest import Server, running_server
from baleen.server.test_bad_requests import error_of

KEY = "sk-whale-7"
OPEN = ("/health", "/health_generate", "/metrics")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("locked"), api_key=KEY) as server:
        server.play("hi")
        yield server


@pytest.mark.parametrize(("path", "method"), [(path, method) for path, _, methods in ROUTES for method in methods])
def test_every_route_but_probes_and_metrics_is_locked(locked: Server, path: str, method: str) -> None:
    with locked.http() as http:
        answer = http.request(method, path.replace("{name:path}", "tiny-whale"))
    if path in OPEN:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    if path.startswith("/v1/messages"):
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "authentication_error"
    else:
        assert error_of(answer, 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
        {"authorization": "Basic dTpw", "x-api-key": KEY},
    ],
)
def test_the_key_opens(locked: Server, headers: dict[str, str]) -> None:
    with locked.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 200
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert answer.json()["choices"][0]["text"] == "hi"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": KEY},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer schl\u00fcssel".encode().decode("latin-1")},
        {"x-api-key": ""},
        {"x-api-key": f"Bearer {KEY}"},
        {"cookie": f"api_key={KEY}"},
    ],
)
def test_anything_else_does_not(locked: Server, headers: dict[str, str]) -> None:
    with locked.http() as http:
        for path in ("/v1/models", f"/v1/models?api_key={KEY}", "/nothing"):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            assert error_of(http.get(path, headers=encoded), 401)["code"] == "invalid_api_key"


def test_the_openai_client_gets_in_and_out(locked: Server) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0)
    chunks = client.chat.completions.create(model="default", messages=[{"role": "user", "content": "x"}], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hi"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-shark").models.list()


def test_keys_are_compared_in_constant_time(locked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))))
    with locked.http() as http:
        assert http.get("/v1/models", headers={"x-api-key": KEY}).status_code == 401
    assert compared == [(KEY.encode(), KEY.encode())]


def test_the_key_is_not_told(locked: Server) -> None:
    with locked.http() as http:
        for path in ("/server_info", "/get_server_info", "/model_info", "/metrics", "/openapi.json"):
            assert KEY not in http.get(path, headers={"x-api-key": KEY}).text
    assert KEY not in repr(locked.config)


def test_a_web_page_may_call(locked: Server) -> None:
    """The preflight carries no key; the answer, errors too, may be read by any page."""
    page = {"origin": "https://page.example"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    with locked.http() as http:
        preflight = http.options("/v1/chat/completions", headers=page | ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "*"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for headers, status in ((page, 401), (page | {"x-api-key": KEY}, 200)):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers
        assert "access-control-allow-origin" not in http.get("/health").headers
        assert http.options("/v1/models").status_code == 405, "OPTIONS needs no key"


def test_a_stream_for_a_web_page_comes_in_pieces(server: Server) -> None:
    server.play("abc" * 30, pause=0.02)
    body = {"prompt": "x", "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers={"origin": "https://page.example"}
    ) as answer:
        assert answer.headers["access-control-allow-origin"] == "*"
        texts = answer.iter_text()
        first = next(texts)
        assert server.client.num_open == 1, "the first event came with the last"
        assert "[DONE]" not in first
        assert "".join(texts).endswith("data: [DONE]\n\n")
