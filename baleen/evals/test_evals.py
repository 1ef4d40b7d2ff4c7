"""The rules, the problems, and whole runs against a server with scripted answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from baleen.__main__ import command
from baleen.evals import needle, problems, scoring
from baleen.evals.scoring import RULES, Answer

# ---- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "expected", "content", "right"),
    [
        ("gsm8k", 58, "232 / 4 = 58. The answer is 58.", True),
        ("gsm8k", "1200", "It costs $1,200", True),
        ("gsm8k", 58, "58 boxes of 4", False),
        ("gsm8k", 58, "", False),
        ("arithmetic", 34, "12 + 22 = 34.", True),
        ("arithmetic", 34, "12 + 22 = 134", False),
        ("arithmetic", "-5", "3 - 8 = -5", True),
        ("json", {"a": 1, "b": ["x"]}, '{"b": ["x"],\n "a": 1}', True),
        ("json", {"a": 1}, '{"a": 1} and more', False),
        ("json", {"a": 1}, '{"a": "1"}', False),
        ("copy", "one two", " one two\n", True),
        ("copy", "one two", "one  two", False),
        ("copy", 3, "a, b, c.\nThere are 3 words.", True),
        ("needle", ["12345", "67890"], "The code of A is 12345. The code of B is 67890.", True),
        ("needle", ["12345", "67890"], "The code of A is 12345.", False),
        ("needle", ["12345"], "12345 " + 300 * "x", False),
    ],
)
def test_rules(task: str, expected: Any, content: str, right: bool) -> None:
    assert RULES[task](Answer(content=content), expected) is right


def test_calls_are_compared_as_values() -> None:
    expected = [{"name": "f", "arguments": {"a": 1, "b": "x"}}, {"name": "g", "arguments": {}}]
    good = (("f", '{"b": "x", "a": 1}'), ("g", "{}"))
    assert scoring.same_calls(Answer(tool_calls=good), expected)
    assert not scoring.same_calls(Answer(tool_calls=good[::-1]), expected)
    assert not scoring.same_calls(Answer(tool_calls=good[:1]), expected)
    assert not scoring.same_calls(Answer(tool_calls=(("f", '{"b": "x", "a": '), good[1])), expected)


def test_interval() -> None:
    """Values of Wilson's formula, from Brown, Cai and DasGupta's definition worked by hand for 10 of 10 and 5 of 10."""
    assert scoring.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert scoring.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert scoring.wilson(0, 0) == (0.0, 1.0)


# ---- problems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", problems.BUNDLED)
def test_bundled_problems(task: str) -> None:
    found = problems.bundled(task)
    assert len(found) == 200
    assert {p.task for p in found} == {task}
    assert len({p.messages[-1]["content"] for p in found}) == 200
    assert all(p.messages[-1]["role"] == "user" for p in found)
    assert all(bool(p.tools) == (task == "tools") for p in found)


@pytest.mark.parametrize("kind", needle.KINDS)
def test_needles_lie_where_they_should(kind: str) -> None:
    found = [p for p in needle.generate([2000], 4, 3.0) if p.labels["kind"] == kind]
    assert len(found) == 4 * len(needle.DEPTHS)
    for problem in found:
        text, question = problem.messages[0]["content"].rsplit("\n\n", 1)
        assert abs(len(text) - 6000) < 700
        first = text.index(f"is {problem.answer[0]}.") / len(text)
        assert abs(first - int(problem.labels["depth"]) / 100) < 0.06
        assert len(problem.answer) == (1 if kind == "single" else needle.MULTI)
        for value in problem.answer:
            assert text.count(value) == 1
            stem = text[: text.index(f" is {value}.")].rsplit(" ", 1)[1]
            assert stem in question
            assert text.count(stem.split("-")[0] + "-") >= 1 + needle.NEAR_MISSES


# ---- runs ---------------------------------------------------------------------------------------

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class Scripted:
    """An OpenAI-compatible server whose answers a function gives."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Reply = lambda body: (200, message("The answer is 0."))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": "scripted", "max_model_len": 3000}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/tokenize":
                    self.send({"count": len(body["prompt"]) // 3})
                    return
                outer.requests.append(body)
                status, data = outer.reply(body)
                self.send(data, status)

            def send(self, data: dict[str, Any], status: int = 200) -> None:
                body = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def message(content: str, calls: list[dict[str, Any]] | None = None, finish: str = "stop") -> dict[str, Any]:
    told = {"role": "assistant", "content": content, "tool_calls": calls}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"choices": [{"message": told, "finish_reason": finish}], "usage": usage}


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_half_right(scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {p.messages[-1]["content"]: str(p.answer) for p in problems.bundled("gsm8k")[:100]}
    scripted.reply = lambda body: (200, message(f"So {right.get(body['messages'][-1]['content'], 'none')}."))
    out = tmp_path / "out.json"
    line = f"eval gsm8k --url {scripted.url}/v1 --max-tokens 99 --out {out}"
    assert command(line.split(), {}) == 0
    printed = capsys.readouterr().out
    assert "50.0 %  [ 43.1,  56.9]  100 of 200" in printed
    assert len(scripted.requests) == 200
    sent = scripted.requests[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("scripted", 99, 0.0)
    data = json.loads(out.read_text())
    assert (data["right"], data["asked"], data["accuracy"]) == (100, 200, 0.5)
    assert [row["correct"] for row in data["answers"]] == 100 * [True] + 100 * [False]


def test_tools_and_schema_are_sent(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {p.messages[-1]["content"]: p for p in problems.bundled("tools")}

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        problem = answers[body["messages"][-1]["content"]]
        assert [tool["function"]["name"] for tool in body["tools"]] == [tool["name"] for tool in problem.tools]
        calls = [
            {"function": {"name": call["name"], "arguments": json.dumps(call["arguments"])}} for call in problem.answer
        ]
        return 200, message("", calls, "tool_calls")

    scripted.reply = reply
    assert command(f"eval tools --url {scripted.url} --num-questions 20".split(), {}) == 0
    assert "100.0 %" in capsys.readouterr().out
    scripted.reply = lambda body: (200, message("{}"))
    assert command(f"eval json --url {scripted.url} --thinking".split(), {}) == 0
    with_schema = [body for body in scripted.requests[20:] if "response_format" in body]
    assert len(with_schema) == sum(p.schema is not None for p in problems.bundled("json")) > 50
    assert all(body["chat_template_kwargs"] == {"thinking": True} for body in scripted.requests[20:])


def test_needle_respects_the_context_and_plots(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "needle.png"
    command(f"eval needle --url {scripted.url} --num-questions 20 --plot {plot}".split(), {})
    printed = capsys.readouterr().out
    assert "single, 2000 tokens" in printed
    assert "4000 tokens" not in printed
    assert len(scripted.requests) == 20
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_shots_come_first(scripted: Scripted, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(5)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    scripted.reply = lambda body: (200, message(body["messages"][-1]["content"]))
    line = f"eval gsm8k --url {scripted.url} --data-path {path} --num-shots 2 --repeat 2"
    assert command(line.split(), {}) == 0
    assert len(scripted.requests) == 6
    told = [m["content"] for m in scripted.requests[0]["messages"]]
    assert told[:4] == ["What is 0?", "It is 0.\n#### 0", "What is 1?", "It is 1.\n#### 1"]


def test_failures(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A busy server is asked again; a refusal counts as wrong and is told; no server is one line."""
    monkeypatch.setattr("baleen.evals.client.asyncio.sleep", no_sleep)
    replies = [(503, {"error": {"message": "full"}}), (200, message("The answer is 0."))]
    scripted.reply = lambda body: replies[min(len(scripted.requests), 2) - 1]
    assert command(f"eval gsm8k --url {scripted.url} --num-questions 1".split(), {}) == 0
    assert len(scripted.requests) == 2
    scripted.reply = lambda body: (400, {"error": {"message": "no such field"}})
    assert command(f"eval gsm8k --url {scripted.url} --num-questions 3".split(), {}) == 1
    printed = capsys.readouterr().out
    assert "3 requests failed" in printed
    assert "no such field" in printed
    assert len(scripted.requests) == 5
    assert command(["eval", "gsm8k", "--url", "127.0.0.1:9"], {}) == 1
    assert "start one with `baleen serve`" in capsys.readouterr().err


async def no_sleep(seconds: float) -> None:
    pass
