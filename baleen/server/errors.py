"""Every 4xx and 5xx is `{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients expect; on /v1/messages
it is `{"type": "error", "error": {"type", "message"}}`, as Anthropic's do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baleen.chat.conversation import EncodingError

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error for the client.

    param   the request's field, as in `messages[2].content`
    code    a word for programs, as in `model_not_found`
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """What the response says beside its body: clients wait and try again on their own."""
        if self.status == 503:
            return {"retry-after": "1"}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def anthropic_body(self) -> bytes:
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": self.message}})


class ClientGone(Exception):
    """The client closed the connection before the answer was complete; nobody reads what is answered now."""


def bad_request(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 whose message starts with the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def validation_error(error: ValidationError, prefix: str = "") -> ApiError:
    """The first complaint of pydantic about a body, or about the part of it at `prefix`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    param = (prefix + field_name(first["loc"])).removesuffix(".")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(param, message) if param else ApiError(400, f"the body: {message}")


def field_name(loc: Sequence[int | str]) -> str:
    """("messages", 2, "content") -> "messages[2].content"."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += f".{part}" if name else part
    return name


def error_response(error: ApiError, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """In the shape of the route at `path`."""
    body = error.anthropic_body() if path.startswith("/v1/messages") else error.body()
    headers = error.headers | dict(headers or {})
    return Response(body, status_code=error.status, media_type="application/json", headers=headers)


def install(app: FastAPI) -> None:
    """Make every exception of `app` end in the one shape."""

    async def api_error(request: Request, error: Any) -> Response:
        return error_response(error, request.url.path)

    async def encoding_error(request: Request, error: Any) -> Response:
        return error_response(bad_request(error.field, str(error)), request.url.path)

    async def client_gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)

    async def http_error(request: Request, error: Any) -> Response:
        code = HTTPStatus(error.status_code).name.lower()
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message, code=code), request.url.path, error.headers)

    async def bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        message = f"internal error: {type(error).__name__}"
        return error_response(ApiError(500, message, code="internal_error"), request.url.path)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(EncodingError, encoding_error)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, bug)
