"""What happens to every HTTP request before its handler: cross-origin rules, counting, the API key, the body's size.

Plain ASGI: a stream's event passes through one more call. `install` puts them in this order, the first outermost.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baleen.config import ServerConfig
from baleen.server.errors import ApiError, error_response
from baleen.server.metrics import Metrics

OPEN_PREFIXES = ("/health", "/metrics")  # need no API key, so that probes and Prometheus work


def install(app: FastAPI, config: ServerConfig, metrics: Metrics) -> None:
    """To be called when all routes are there."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    app.add_middleware(BodyLimit, most=config.max_request_body_size)
    if config.api_key is not None:
        app.add_middleware(ApiKey, key=config.api_key)
    app.add_middleware(HttpMetrics, metrics=metrics, routes=routes)
    # Any web page may call the API: without the key it gets what anyone on this network gets. No cookies are used.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["retry-after"],
    )


class HttpMetrics:
    """Counts requests by route and responses by status. A path that is no route is `other`: anybody can make one up."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route]) -> None:
        self._app = app
        self._metrics = metrics
        self._patterns = [(route.path_regex, route.path) for route in routes if route.param_convertors]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = next((name for pattern, name in self._patterns if pattern.match(scope["path"])), scope["path"])
        endpoint = self._metrics.http_request(path, scope["method"])
        status = 500  # unless something is sent: then the handler failed

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.http_active.inc()
        try:
            await self._app(scope, receive, counting)
        finally:
            self._metrics.http_active.inc(-1)
            self._metrics.http_response(endpoint, status)


class ApiKey:
    """Lets requests pass that carry the key: `Authorization: Bearer KEY` or, as Anthropic's clients do, `x-api-key`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            message = "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
            response = error_response(ApiError(401, message, code="invalid_api_key"), scope["path"])
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or scope["path"].startswith(OPEN_PREFIXES):
            return True
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, value = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            elif name != b"x-api-key":
                continue
            if hmac.compare_digest(value.strip(), self._key):
                return True
        return False


class BodyLimit:
    """Refuses a body of more than `most` bytes with 413: by its announced length, or when it has come so far."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._most:
            await error_response(self._error(), scope["path"])(scope, receive, send)
            return
        read = 0

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._error()
            return message

        await self._app(scope, counting, send)

    def _error(self) -> ApiError:
        message = f"the body has more than {self._most} bytes (--max-request-body-size)"
        return ApiError(413, message, code="request_too_large")
