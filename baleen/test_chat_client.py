"""`baleen chat` against a small HTTP server that records what it is asked and answers from a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from baleen import chat_client


class Endpoint:
    """Answers every question with `deltas`, then `late_error` if any; with `error` (status, message) at once."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": "Hi"}, {"content": "!"}]
        self.error: tuple[int, str] | None = None
        self.late_error = ""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "tiny-whale"}]})

            def do_POST(self) -> None:
                endpoint.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                if endpoint.error:
                    self._send(endpoint.error[0], {"error": {"message": endpoint.error[1]}})
                    return
                events = [{"choices": [{"index": 0, "delta": d}]} for d in endpoint.deltas]
                if endpoint.late_error:
                    events.append({"error": {"message": endpoint.late_error}})
                text = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
                self._send(200, text, "text/event-stream")

            def _send(self, status: int, data: Any, kind: str = "application/json") -> None:
                body = (data if isinstance(data, str) else json.dumps(data)).encode()
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The lines the user types; an exception is raised instead of a line; Ctrl-D follows the last."""

    def script(*lines: str | type[BaseException]) -> None:
        left = [*lines, EOFError]

        def read(prompt: str) -> str:
            line = left.pop(0)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)

    return script


def test_talk_clear_and_end(endpoint: Endpoint, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say("hello", "", "again", "/clear", "new", "/what", "/exit", "never sent")
    options: dict[str, Any] = {"max_tokens": 9, "temperature": 0.5, "system": "Be brief.", "thinking": True}
    assert chat_client.main(endpoint.url + "/v1/", None, **options) == 0
    out = capsys.readouterr().out
    assert out.count("Hi!") == 3
    system = {"role": "system", "content": "Be brief."}
    hello, hi = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi!"}
    assert [body["messages"] for body in endpoint.bodies] == [
        [system, hello],
        [system, hello, hi, {"role": "user", "content": "again"}],
        [system, {"role": "user", "content": "new"}],
    ]
    first = endpoint.bodies[0]
    assert (first["model"], first["max_tokens"], first["temperature"], first["stream"]) == ("tiny-whale", 9, 0.5, True)
    assert first["chat_template_kwargs"] == {"thinking": True}


def test_reasoning_is_dim_and_not_sent_back(
    endpoint: Endpoint, say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.deltas = [{"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "Yes"}]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    say("hello", "more")
    assert chat_client.main(endpoint.url.removeprefix("http://"), "m") == 0
    assert "\x1b[2mhmm\x1b[0m\n\nYes\n" in capsys.readouterr().out
    assert endpoint.bodies[1]["messages"][1] == {"role": "assistant", "content": "Yes"}
    assert "max_tokens" not in endpoint.bodies[0]
    assert endpoint.bodies[0]["model"] == "m"


def test_ctrl_c_stops_the_answer_not_the_program(
    endpoint: Endpoint, say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say("hello", KeyboardInterrupt, "more")
    show = chat_client._Printer.show

    def interrupted(printer: Any, reasoning: str, content: str) -> None:
        show(printer, reasoning, content)
        if content == "Hi" and len(endpoint.bodies) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_client._Printer, "show", interrupted)
    assert chat_client.main(endpoint.url) == 0
    assert "Hi [stopped]" in capsys.readouterr().out
    assert endpoint.bodies[1]["messages"][1] == {"role": "assistant", "content": "Hi"}


def test_errors_are_shown_and_the_question_is_forgotten(
    endpoint: Endpoint, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.error = (400, "messages: the prompt has 9 tokens")
    say("too long")
    assert chat_client.main(endpoint.url) == 0
    assert "error: messages: the prompt has 9 tokens (HTTP 400)" in capsys.readouterr().err
    endpoint.error = None
    endpoint.late_error = "the engine died"
    say("hello", "again")
    assert chat_client.main(endpoint.url) == 0
    assert capsys.readouterr().err.count("error: the engine died") == 2
    assert [len(body["messages"]) for body in endpoint.bodies] == [1, 1, 1]


def test_no_server(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say()
    assert chat_client.main("http://127.0.0.1:9") == 1
    assert "no server answers at http://127.0.0.1:9; start one with `baleen serve`" in capsys.readouterr().err
