"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, ClassVar

import msgspec
from fastapi import Request, Response
from pydantic_core import from_json

from baleen.chat.output_parser import Content, Reasoning, ToolArguments, ToolCall
from baleen.server import fields
from baleen.server.anthropic_protocol import MessagesRequest, PromptFields
from baleen.server.chat_run import ChatRun, Step, start_chat
from baleen.server.errors import ApiError
from baleen.server.generation import Service
from baleen.server.prompt import encode_chat
from baleen.server.protocol import ChatRequest
from baleen.server.stream import EventStream, json_response, read_json
from baleen.server.turns import errors_about, seal

Event = dict[str, Any]


async def messages(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    body = fields.parse(MessagesRequest, await read_json(request))
    turns = body.turns()
    message_id = f"msg_{uuid.uuid4().hex[:24]}"
    with errors_about(body.field_names(turns)):
        run = await _start(request, body.chat_request(turns, message_id), arrived)
        answer = _Answer(service, body, run, message_id)
        if body.stream:
            first = await run.first(request)
            return EventStream(answer.events(first), run.generation, failed=_failed, done=b"")
        return json_response(answer.whole(await run.all(request)))


async def _start(request: Request, chat: ChatRequest, arrived: float) -> ChatRun:
    """As Anthropic does, an answer that may be longer than the context goes to its end. Raises ApiError."""
    try:
        return await start_chat(request, chat, arrived=arrived)
    except ApiError as error:
        if error.code != "context_length_exceeded":
            raise
        if error.param != "max_completion_tokens":
            # The words by which agents see that they must shorten the conversation.
            raise ApiError(400, f"prompt is too long: {error.message}", param=error.param, code=error.code) from None
    return await start_chat(request, chat.model_copy(update={"max_completion_tokens": None}), arrived=arrived)


async def count_tokens(request: Request) -> Response:
    """Tokens of the prompt that the same fields would make."""
    service: Service = request.app.state.service
    body = fields.parse(PromptFields, await read_json(request))
    service.check_model(body.model)
    turns = body.turns()
    with errors_about(body.field_names(turns)):
        prompt = await encode_chat(service, body.chat_request(turns))
    return json_response({"input_tokens": len(prompt.input_ids)})


class _Block:
    """A block of the answer, as it grows."""

    kind = ""
    empty: ClassVar[dict[str, Any]] = {}

    def __init__(self, index: int, **names: str) -> None:
        self._index = index
        self._names = names
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def content(self) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any] | None:
        """What tells of `text`, if anything does."""
        raise NotImplementedError

    def body(self) -> dict[str, Any]:
        return {"type": self.kind, **self._names, **self.content()}

    def begin(self) -> Iterator[Event]:
        block = {"type": self.kind, **self._names, **self.empty}
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def add(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        delta = self.delta(text)
        if delta is not None:
            yield self._delta_event(delta)

    def end(self) -> Iterator[Event]:
        yield {"type": "content_block_stop", "index": self._index}

    def _delta_event(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


class _ThinkingBlock(_Block):
    """The signature holds the text where the client does not want to see it but shall send it back."""

    kind = "thinking"
    empty: ClassVar = {"thinking": "", "signature": ""}

    def __init__(self, index: int, *, omitted: bool) -> None:
        super().__init__(index)
        self._omitted = omitted

    def content(self) -> dict[str, Any]:
        shown, hidden = ("", self.text) if self._omitted else (self.text, "")
        return {"thinking": shown, "signature": seal(hidden)}

    def delta(self, text: str) -> dict[str, Any] | None:
        return None if self._omitted else {"type": "thinking_delta", "thinking": text}

    def end(self) -> Iterator[Event]:
        yield self._delta_event({"type": "signature_delta", "signature": self.content()["signature"]})
        yield from super().end()


class _TextBlock(_Block):
    kind = "text"
    empty: ClassVar = {"text": ""}

    def content(self) -> dict[str, Any]:
        return {"text": self.text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"type": "text_delta", "text": text}


class _ToolUseBlock(_Block):
    kind = "tool_use"
    empty: ClassVar = {"input": {}}

    def content(self) -> dict[str, Any]:
        """Of a call that was cut, the members that are complete: what Anthropic's clients make of the stream."""
        try:
            return {"input": from_json(self.text, allow_partial=True) if self.text else {}}
        except ValueError:  # nested too deeply
            return {"input": {"arguments": self.text}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"type": "input_json_delta", "partial_json": text}


class _Answer:
    """One message, whole or as events."""

    def __init__(self, service: Service, body: MessagesRequest, run: ChatRun, message_id: str) -> None:
        self._run = run
        self._max_tokens = body.max_tokens
        self._stop_sequences = body.stop_sequences or []
        self._omitted = body.thinking is not None and body.thinking.display == "omitted"
        self._blocks: list[_Block] = []
        self._open = False  # the last block may still grow
        self._stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}
        self._fixed = {"id": message_id, "type": "message", "role": "assistant", "model": service.model_name}

    def whole(self, steps: list[Step]) -> dict[str, Any]:
        """Raises ApiError."""
        for _ in self._read(steps):
            pass
        return self._message()

    async def events(self, first: list[Step]) -> AsyncIterator[bytes]:
        yield _sent([{"type": "message_start", "message": self._message()}])
        async for steps in self._run.rest(first):
            data = _sent(self._read(steps))
            if data:
                yield data
        delta = {"type": "message_delta", "delta": self._stop, "usage": self._usage()}
        yield _sent([delta, {"type": "message_stop"}])

    def _read(self, steps: list[Step]) -> Iterator[Event]:
        for step in steps:
            yield from self._read_events(step)
            if step.finish_reason is not None:
                yield from self._end_block()
                self._stop = self._stop_of(step)

    def _read_events(self, step: Step) -> Iterator[Event]:
        for event in step.events:
            match event:
                case Reasoning(text):
                    if not self._growing(_ThinkingBlock):
                        yield from self._begin(_ThinkingBlock(len(self._blocks), omitted=self._omitted))
                    yield from self._blocks[-1].add(text)
                case Content(text):
                    if not self._growing(_TextBlock):
                        yield from self._begin(_TextBlock(len(self._blocks)))
                    yield from self._blocks[-1].add(text)
                case ToolCall(index, name):
                    call_id = "toolu_" + self._run.call_id(0, index).removeprefix("call_")
                    yield from self._begin(_ToolUseBlock(len(self._blocks), id=call_id, name=name))
                case ToolArguments(_, text):
                    yield from self._blocks[-1].add(text)  # they come right after their call

    def _growing(self, kind: type[_Block]) -> bool:
        return self._open and isinstance(self._blocks[-1], kind)

    def _begin(self, block: _Block) -> Iterator[Event]:
        yield from self._end_block()
        self._blocks.append(block)
        self._open = True
        yield from block.begin()

    def _end_block(self) -> Iterator[Event]:
        if self._open:
            self._open = False
            yield from self._blocks[-1].end()

    def _stop_of(self, step: Step) -> dict[str, str | None]:
        """Raises ApiError for an answer that was aborted: the protocol has no word for that."""
        matched = step.piece.matched
        match step.finish_reason:
            case "abort":
                raise ApiError(499, step.piece.message or "the request was aborted", code="aborted")
            case "length":
                cut = self._run.usage().completion_tokens >= self._max_tokens
                return {"stop_reason": "max_tokens" if cut else "model_context_window_exceeded", "stop_sequence": None}
            case "tool_calls":
                return {"stop_reason": "tool_use", "stop_sequence": None}
            case _ if isinstance(matched, str) and matched in self._stop_sequences:
                return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _message(self) -> dict[str, Any]:
        content = [block.body() for block in self._blocks]
        return self._fixed | {"content": content, **self._stop, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        """Of what has been read so far. Tokens from the prefix cache are counted apart from the other input."""
        usage = self._run.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return {
            "input_tokens": usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.completion_tokens_details.reasoning_tokens},
        }


def _sent(events: Iterable[Event]) -> bytes:
    """As server-sent events."""
    return b"".join(
        f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n" for event in events
    )


def _failed(error: ApiError) -> bytes:
    return b"event: error\ndata: " + error.anthropic_body() + b"\n\n"
