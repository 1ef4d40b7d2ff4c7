"""Every 4xx and 5xx of every route is `{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients expect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baleen.chat.encoding import EncodingError

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

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


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
    param = prefix + field_name(first["loc"])
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


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return Response(error.body(), status_code=error.status, media_type="application/json", headers=headers)


def install(app: FastAPI) -> None:
    """Make every exception of `app` end in the one shape."""

    async def api_error(request: Request, error: Any) -> Response:
        return error_response(error)

    async def encoding_error(request: Request, error: Any) -> Response:
        return error_response(bad_request(error.field, str(error)))

    async def client_gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)

    async def http_error(request: Request, error: Any) -> Response:
        code = HTTPStatus(error.status_code).name.lower()
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message, code=code), error.headers)

    async def bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(ApiError(500, f"internal error: {type(error).__name__}", code="internal_error"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(EncodingError, encoding_error)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, bug)
