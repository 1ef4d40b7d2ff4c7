"""Asks an OpenAI-compatible server, many questions at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from baleen.evals.problems import Problem
from baleen.evals.scoring import Answer

RETRIES = 5  # of a request the server had no room for, or that did not reach it
_TIMEOUT = httpx.Timeout(3600.0, connect=10.0)


class Unreachable(Exception):
    """There is no server, or it does not speak the API; the message is for the user."""


class Server:
    """One server. `options` are fields sent with every question (temperature, top_p, max_tokens, ...).

    thinking   None: as each problem says
    """

    def __init__(self, url: str, api_key: str | None, options: dict[str, Any], thinking: bool | None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._options = options
        self._thinking = thinking

    def model(self) -> tuple[str, int]:
        """(name of the first model listed, most tokens of a request or a large number). Raises Unreachable."""
        try:
            response = httpx.get(f"{self.url}/v1/models", headers=self._headers, timeout=10.0)
            response.raise_for_status()
            card = response.json()["data"][0]
            return str(card["id"]), int(card.get("max_model_len") or 2**31)
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise Unreachable(f"{self.url} does not list a model: {error}") from error

    def characters_per_token(self, text: str) -> float:
        """By the server's /tokenize; 4 where it has none."""
        try:
            body = {"prompt": text, "model": self._options.get("model")}
            response = httpx.post(f"{self.url}/tokenize", json=body, headers=self._headers, timeout=60.0)
            response.raise_for_status()
            return len(text) / int(response.json()["count"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError, ZeroDivisionError):
            return 4.0

    async def ask(
        self, problems: Sequence[Problem], parallel: int, done: Callable[[int, Answer], None]
    ) -> list[Answer]:
        """All answers, in the order of the problems; `done` hears of each as it comes."""
        limits = httpx.Limits(max_connections=parallel)
        gate = asyncio.Semaphore(parallel)
        async with httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, headers=self._headers) as http:

            async def one(index: int) -> Answer:
                async with gate:
                    answer = await self._answer(http, problems[index])
                done(index, answer)
                return answer

            return await asyncio.gather(*(one(i) for i in range(len(problems))))

    async def _answer(self, http: httpx.AsyncClient, problem: Problem) -> Answer:
        for attempt in range(RETRIES + 1):
            try:
                response = await http.post(f"{self.url}/v1/chat/completions", json=self._body(problem))
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return _read(response.json())
                failure = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code < 500 and response.status_code not in (408, 429):
                    break  # the question is refused: asking again changes nothing
            if attempt < RETRIES:
                await asyncio.sleep(2.0**attempt)
        return Answer(error=failure)

    def _body(self, problem: Problem) -> dict[str, Any]:
        thinking = problem.thinking if self._thinking is None else self._thinking
        body: dict[str, Any] = {
            **self._options,
            "messages": problem.messages,
            "chat_template_kwargs": {"thinking": thinking},
        }
        if problem.tools:
            body["tools"] = [{"type": "function", "function": tool} for tool in problem.tools]
        if problem.schema is not None:
            schema = {"name": "answer", "schema": problem.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def _read(body: dict[str, Any]) -> Answer:
    choice = body["choices"][0]
    message = choice["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
    usage = body.get("usage") or {}
    return Answer(
        content=message.get("content") or "",
        tool_calls=tuple(calls),
        finish_reason=choice.get("finish_reason") or "",
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
    )
