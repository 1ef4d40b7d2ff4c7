"""`baleen chat`: talk to a server in the terminal, over its OpenAI route. Any OpenAI-compatible server will do."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

with contextlib.suppress(ImportError):  # gives `input` line editing and history; not on every system
    import readline  # noqa: F401

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"
_TIMEOUT = httpx.Timeout(None, connect=5.0)  # the first token of a long prompt may take minutes
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

Message = dict[str, str]


class ServerError(Exception):
    """The server answered with an error; its message is for the user."""


def main(
    url: str,
    model: str | None = None,
    thinking: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    system: str | None = None,
) -> int:
    """Chat until /exit or Ctrl-D; returns the exit code.

    url    where the server listens, with or without /v1
    model  None: the first one the server lists
    """
    url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    options: dict[str, Any] = {"chat_template_kwargs": {"thinking": thinking}}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    with httpx.Client(base_url=url, timeout=_TIMEOUT) as http:
        try:
            options["model"] = model or _first_model(http)
        except (httpx.HTTPError, ServerError) as error:
            print(f"baleen: error: {_no_server(url, error)}", file=sys.stderr)
            return 1
        print(f"{options['model']} at {url}: {_HELP}")
        messages = list(opening)
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print(f"\n{_HELP}", end="")
                continue
            if line == "/exit":
                return 0
            if line == "/clear":
                messages = list(opening)
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                messages = _exchange(http, messages, line, options)


def _exchange(http: httpx.Client, messages: list[Message], line: str, options: dict[str, Any]) -> list[Message]:
    """Ask and print the answer; returns the conversation with both, or as it was if there was no answer."""
    asked = [*messages, {"role": "user", "content": line}]
    printer = _Printer()
    try:
        for reasoning, content in _answer(http, {**options, "messages": asked}):
            printer.show(reasoning, content)
    except KeyboardInterrupt:
        printer.end(" [stopped]")
    except (httpx.HTTPError, ServerError) as error:
        printer.end()
        message = _no_server(str(http.base_url), error) if isinstance(error, httpx.HTTPError) else error
        print(f"error: {message}", file=sys.stderr)
        return messages
    else:
        printer.end()
    return [*asked, {"role": "assistant", "content": printer.content}]


def _first_model(http: httpx.Client) -> str:
    response = http.get("/v1/models")
    _raise_error(response)
    return str(response.json()["data"][0]["id"])


def _answer(http: httpx.Client, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(reasoning, content) as they come. Leaving early closes the connection, which ends the request on the server."""
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.is_error:
            response.read()
        _raise_error(response)
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise ServerError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                delta = choice["delta"]
                yield delta.get("reasoning_content") or "", delta.get("content") or ""


def _raise_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise ServerError(f"{message} (HTTP {response.status_code})")


def _no_server(url: str, error: Exception) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"no server answers at {url}; start one with `baleen serve`, or name its address with --url"
    return f"{url}: {error or type(error).__name__}"


class _Printer:
    """Writes an answer as it comes: reasoning dim, then a blank line, then content."""

    def __init__(self) -> None:
        self.content = ""
        self._in_reasoning = False
        self._colour = sys.stdout.isatty()

    def show(self, reasoning: str, content: str) -> None:
        if reasoning:
            if not self._in_reasoning and self._colour:
                sys.stdout.write(_DIM)
            self._in_reasoning = True
            sys.stdout.write(reasoning)
        if content:
            if self._in_reasoning:
                self._leave_reasoning()
                sys.stdout.write("\n\n")
            self.content += content
            sys.stdout.write(content)
        sys.stdout.flush()

    def end(self, note: str = "") -> None:
        self._leave_reasoning()
        print(note, flush=True)

    def _leave_reasoning(self) -> None:
        if self._in_reasoning and self._colour:
            sys.stdout.write(_PLAIN)
        self._in_reasoning = False
