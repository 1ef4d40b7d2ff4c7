"""Server-sent events, and noticing that the client has gone.

Handlers await the engine's first output before they answer, so that what goes wrong before it is a plain HTTP error.
Later errors are an event: `data: {"error": ...}` and then, either way, `data: [DONE]`, unless a protocol has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from baleen.server.errors import ApiError, ClientGone
from baleen.server.generation import Generation, Piece

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
_encode = msgspec.json.Encoder().encode
_log = logging.getLogger(__name__)


async def read_json(request: Request) -> bytes:
    """The body, which says that it is JSON. Raises ApiError 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the content-type is {kind!r}; send the header 'Content-Type: application/json'"
        raise ApiError(400, message, code="unsupported_media_type")
    return await request.body()


def json_response(data: Any, status: int = 200) -> Response:
    """`data`: a msgspec struct, or what JSON knows."""
    return Response(_encode(data), status_code=status, media_type="application/json")


async def first_pieces(request: Request, generation: Generation) -> list[Piece]:
    """The engine's first word on a request; raises what it says if that is an error, or ClientGone."""
    try:
        return await until_disconnect(request, generation.next())
    except BaseException:
        generation.close()
        raise


async def all_pieces(request: Request, generation: Generation) -> list[Piece]:
    """Everything, when it is complete. Raises ApiError, or ClientGone; the sequences are aborted then."""

    async def collect() -> list[Piece]:
        pieces = []
        while not generation.finished:
            pieces += await generation.next()
        return pieces

    try:
        return await until_disconnect(request, collect())
    finally:
        generation.close()


async def pieces_until_finished(generation: Generation, first: list[Piece]) -> AsyncIterator[list[Piece]]:
    """`first` and all that follows, as it comes."""
    yield first
    while not generation.finished:
        yield await generation.next()


def event(data: Any) -> bytes:
    """One event holding `data`, a msgspec struct, as JSON."""
    return b"data: " + _encode(data) + b"\n\n"


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it when the client goes away. The body must have been read. Raises ClientGone."""
    return await _first(work, request.receive)


async def _first(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields (each item one or more whole events) as it comes; ends `generation` in any case.

    failed   the event that tells of an error
    done     the last event
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        generation: Generation,
        *,
        failed: Callable[[ApiError], bytes] = error_event,
        done: bytes = _DONE,
    ) -> None:
        super().__init__()
        self._events = events
        self._generation = generation
        self._failed = failed
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone):
                await _first(self._send(send), receive)
        finally:
            self._generation.close()

    async def _send(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        except Exception as error:
            _log.exception("a stream failed")
            failure = ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
            await send({"type": "http.response.body", "body": self._failed(failure), "more_body": True})
        await send({"type": "http.response.body", "body": self._done, "more_body": False})
