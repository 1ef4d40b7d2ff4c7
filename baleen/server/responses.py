"""POST /v1/responses, and the routes that read, delete and cancel a stored response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import msgspec
from fastapi import Request, Response

from baleen.server import fields
from baleen.server.chat_run import ChatRun, Step, start_chat
from baleen.server.errors import ApiError, bad_request
from baleen.server.generation import Service
from baleen.server.response_store import ResponseStore, StoredResponse
from baleen.server.responses_output import Event, Output
from baleen.server.responses_protocol import CHAT_FIELDS, ResponsesRequest, Toolbox, read_input
from baleen.server.stream import EventStream, json_response, read_json
from baleen.server.turns import Turns, errors_about


async def create_response(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    store: ResponseStore = request.app.state.responses
    raw = await read_json(request)
    body = fields.parse(ResponsesRequest, raw)
    if body.store and not store.enabled:
        raise bad_request("store", "nothing is stored with --tokenizer-worker-num above 1; send store: false")
    before = None if body.previous_response_id is None else _stored(store, body.previous_response_id)
    kept = Turns(before.messages if before is not None else (), "previous_response_id")
    read_input(body.input, kept, store.item)
    turns = kept.headed(body.instructions, "instructions")
    toolbox = Toolbox.read(body.tools)
    response_id = f"resp_{uuid.uuid4().hex}"
    with errors_about(CHAT_FIELDS | turns.field_names() | toolbox.field_names):
        run = await start_chat(request, body.chat_request(turns, toolbox, response_id), arrived=arrived)
        echo = _echo(service, body, toolbox, response_id, run.created)
        answer = _Answer(echo, run, Output(run, body, toolbox, service))

        def keep(data: bytes) -> None:
            """Store the answer, and the conversation with it: both together are what its successor starts from."""
            read_input(answer.items, kept, store.item)
            num_bytes = len(raw) + len(data) + (before.num_bytes if before is not None else 0)
            store.put(response_id, StoredResponse(data, kept.messages, answer.items, num_bytes))

        if body.store is not False and store.enabled:
            answer.when_done = keep
        if body.stream:
            events = answer.events(await run.first(request))
            return EventStream(events, run.generation, failed=answer.failed, done=b"")
        return Response(answer.whole(await run.all(request)), media_type="application/json")


async def get_response(request: Request) -> Response:
    for name in ("stream", "starting_after"):
        if request.query_params.get(name, "false") != "false":
            raise bad_request(name, "a stored response cannot be streamed again", "unsupported_parameter")
    return Response(_named(request).body, media_type="application/json")


async def delete_response(request: Request) -> Response:
    _named(request)
    response_id = request.path_params["response_id"]
    request.app.state.responses.delete(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    """As OpenAI: what can be cancelled is a background response, and there are none here."""
    _named(request)
    message = "only a response made with background: true can be cancelled; close the connection to stop another one"
    raise ApiError(400, message, param="response_id", code="not_cancellable")


def _named(request: Request) -> StoredResponse:
    try:
        return _stored(request.app.state.responses, request.path_params["response_id"])
    except ApiError as error:
        raise ApiError(404, error.message, param="response_id", code="response_not_found") from None


def _stored(store: ResponseStore, response_id: str) -> StoredResponse:
    """Raises ApiError 400."""
    response = store.get(response_id)
    if response is None:
        why = "" if store.enabled else ": nothing is with --tokenizer-worker-num above 1"
        message = f"no response {response_id!r} is stored{why}; send the whole conversation as input"
        raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
    return response


def _echo(service: Service, body: ResponsesRequest, toolbox: Toolbox, response_id: str, created: int) -> dict[str, Any]:
    """The fields of a response that say what was asked for."""
    reasoning, defaults = body.reasoning, service.sampling_defaults
    text_format = body.text.format if body.text is not None else None
    shown_format = text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": service.model_name,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
        "text": {"format": shown_format, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": toolbox.offered,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


class _Answer:
    """One response, whole or as events.

    when_done   called with the JSON of a response that did not fail
    """

    def __init__(self, echo: dict[str, Any], run: ChatRun, output: Output) -> None:
        self.when_done: Callable[[bytes], None] | None = None
        self._echo = echo
        self._run = run
        self._output = output
        self._num_events = 0
        self._last: Step | None = None

    @property
    def items(self) -> list[dict[str, Any]]:
        return self._output.bodies()

    def whole(self, steps: list[Step]) -> bytes:
        for _ in self._read(steps):
            pass
        response = self._ended()
        return self._done(response)

    async def events(self, first: list[Step]) -> AsyncIterator[bytes]:
        response = self._response("in_progress", usage=None)
        yield self._sent([{"type": f"response.{name}", "response": response} for name in ("created", "in_progress")])
        async for steps in self._run.rest(first):
            data = self._sent(self._read(steps))
            if data:
                yield data
        response = self._ended()
        self._done(response)
        yield self._sent([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that breaks."""
        return self._sent([{"type": "response.failed", "response": self._failed(error.message)}])

    def _read(self, steps: list[Step]) -> Iterator[Event]:
        for step in steps:
            self._last = step
            yield from self._output.add(step)
            if step.finish_reason is not None:
                cut = step.finish_reason in ("length", "abort")
                yield from self._output.end("incomplete" if cut else "completed")

    def _ended(self) -> dict[str, Any]:
        """The response that the last step makes of it."""
        assert self._last is not None, "an answer has a last step"
        match self._last.finish_reason:
            case "length":
                return self._response("incomplete", incomplete_details={"reason": "max_output_tokens"})
            case "abort":
                return self._failed(self._last.piece.message or "the request was aborted")
            case _:
                return self._response("completed", completed_at=int(time.time()))

    def _failed(self, message: str) -> dict[str, Any]:
        for _ in self._output.end("incomplete"):
            pass
        return self._response("failed", error={"code": "server_error", "message": message})

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        details = {"completed_at": None, "error": None, "incomplete_details": None}
        return self._echo | details | {"status": status, "output": self.items, "usage": self._usage()} | fields

    def _usage(self) -> dict[str, Any]:
        usage = self._run.usage()
        cached, reasoning = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details.reasoning_tokens
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage.total_tokens,
        }

    def _done(self, response: dict[str, Any]) -> bytes:
        data = msgspec.json.encode(response)
        if self.when_done is not None and response["status"] != "failed":
            self.when_done(data)
        return data

    def _sent(self, events: Iterable[Event]) -> bytes:
        """Server-sent events, with their numbers."""
        data = b""
        for event in events:
            kind = event["type"]
            numbered = {"type": kind, "sequence_number": self._num_events} | event
            data += f"event: {kind}\ndata: ".encode() + msgspec.json.encode(numbered) + b"\n\n"
            self._num_events += 1
        return data
