"""The output items of a response as they grow, and the events that tell of it. docs/agents.md has the order.

The events here lack their `sequence_number`; the stream of a response counts them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic_core import from_json

from baleen.chat.output_parser import Content, Reasoning, ToolArguments, ToolCall
from baleen.chat.tokenizer import Tokenizer
from baleen.server.answers import TokenLogprob, chat_logprobs
from baleen.server.chat_run import ChatRun, Step
from baleen.server.generation import Piece, Service
from baleen.server.responses_protocol import ResponsesRequest, Toolbox, ToolRef
from baleen.server.turns import is_object, seal

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]
_THINK_END_CHARS = len("</think>")


class _Item:
    """One output item. `index` is its place in the output."""

    prefix = ""

    def __init__(self, index: int) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.status: Status = "in_progress"
        self._index = index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def body(self) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        yield {"type": "response.output_item.added", "output_index": self._index, "item": self.body()}

    def end(self, status: Status) -> Iterator[Event]:
        self.status = status
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.body()}

    def _event(self, name: str, **fields: Any) -> Event:
        return {"type": f"response.{name}", "item_id": self.id, "output_index": self._index, **fields}


class MessageItem(_Item):
    """What the model says to the user."""

    prefix = "msg"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[TokenLogprob] = []

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}

    def body(self) -> dict[str, Any]:
        content = [] if self.status == "in_progress" else [self._part()]
        return {"id": self.id, "type": "message", "status": self.status, "role": "assistant", "content": content}

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield self._event("content_part.added", content_index=0, part=self._part())

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return self._event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def end(self, status: Status) -> Iterator[Event]:
        yield self._event("output_text.done", content_index=0, text=self.text, logprobs=list(self._logprobs))
        yield self._event("content_part.done", content_index=0, part=self._part())
        yield from super().end(status)


class ReasoningItem(_Item):
    """The reasoning, in full: as `content`, or, where the client asked for a summary, as the one part of that.

    sealed   `encrypted_content` shall hold it too
    """

    prefix = "rs"

    def __init__(self, index: int, *, as_summary: bool, sealed: bool) -> None:
        super().__init__(index)
        self._as_summary = as_summary
        self._sealed = sealed
        self._kind = "reasoning_summary_text" if as_summary else "reasoning_text"
        self._place = {"summary_index": 0} if as_summary else {"content_index": 0}

    def _part(self) -> dict[str, Any]:
        return {"type": "summary_text" if self._as_summary else "reasoning_text", "text": self.text}

    def _part_event(self, name: str) -> Event:
        kind = "reasoning_summary_part" if self._as_summary else "content_part"
        return self._event(f"{kind}.{name}", **self._place, part=self._part())

    def body(self) -> dict[str, Any]:
        parts = [] if self.status == "in_progress" else [self._part()]
        body: dict[str, Any] = {"id": self.id, "type": "reasoning", "status": self.status, "summary": []}
        body |= {"summary": parts} if self._as_summary else {"content": parts}
        return body | ({"encrypted_content": seal(self.text)} if self._sealed and parts else {})

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield self._part_event("added")

    def add(self, text: str) -> Event:
        self._texts.append(text)
        return self._event(f"{self._kind}.delta", **self._place, delta=text)

    def end(self, status: Status) -> Iterator[Event]:
        yield self._event(f"{self._kind}.done", **self._place, text=self.text)
        yield self._part_event("done")
        yield from super().end(status)


class CallItem(_Item):
    """A call of one of the client's functions."""

    prefix = "fc"

    def __init__(self, index: int, call_id: str, ref: ToolRef) -> None:
        super().__init__(index)
        self._names = {"call_id": call_id, "name": ref.name}
        if ref.namespace is not None:
            self._names["namespace"] = ref.namespace

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            **self._names,
            "arguments": self.text,
        }

    def add(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        yield self._event("function_call_arguments.delta", delta=text)

    def end(self, status: Status) -> Iterator[Event]:
        """A call that went wrong in the middle is incomplete too: nobody shall run half of it."""
        yield self._event("function_call_arguments.done", arguments=self.text)
        yield from super().end(status if is_object(self.text) else "incomplete")


class CustomCallItem(CallItem):
    """A call of a custom tool: its input is the parameter `input` of the function that stands for it."""

    prefix = "ctc"

    def body(self) -> dict[str, Any]:
        written = "" if self.status == "in_progress" else self._input()
        return {
            "id": self.id,
            "type": "custom_tool_call",
            "status": self.status,
            **self._names,
            "input": written,
        }

    def add(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        yield from ()  # the text is a part of a JSON string: its characters are known when it is whole

    def end(self, status: Status) -> Iterator[Event]:
        written = self._input()
        yield self._event("custom_tool_call_input.delta", delta=written)
        yield self._event("custom_tool_call_input.done", input=written)
        yield from _Item.end(self, status)

    def _input(self) -> str:
        """All that was written if the model called the function in another way."""
        try:
            arguments = from_json(self.text, allow_partial="trailing-strings")
        except ValueError:
            return self.text
        match arguments:
            case {"input": str(written)} if len(arguments) == 1:
                return written
        return self.text if arguments else ""


ItemT = TypeVar("ItemT", bound=_Item)


class Output:
    """All items of one answer."""

    def __init__(self, run: ChatRun, body: ResponsesRequest, toolbox: Toolbox, service: Service) -> None:
        self.items: list[_Item] = []
        self._run = run
        self._toolbox = toolbox
        self._as_summary = body.wants_summary
        self._sealed = body.wants_encrypted_reasoning
        self._logprobs = _ContentLogprobs(service.tokenizer, thinks=run.in_reasoning(0))

    def bodies(self) -> list[dict[str, Any]]:
        return [item.body() for item in self.items]

    def add(self, step: Step) -> Iterator[Event]:
        """What the step tells, as events."""
        self._logprobs.read(step.piece)
        for event in step.events:
            match event:
                case Reasoning(text):
                    item = self._last(ReasoningItem)
                    if item is None:
                        item = ReasoningItem(len(self.items), as_summary=self._as_summary, sealed=self._sealed)
                        yield from self._begin(item)
                    self._logprobs.skip(text)
                    yield item.add(text)
                case Content(text):
                    message = self._last(MessageItem)
                    if message is None:
                        message = MessageItem(len(self.items))
                        yield from self._begin(message)
                    yield message.add(text, self._logprobs.take(text))
                case ToolCall(index, name):
                    self._logprobs.stop()
                    ref = self._toolbox.ref(name)
                    kind = CustomCallItem if ref.custom else CallItem
                    yield from self._begin(kind(len(self.items), self._run.call_id(0, index), ref))
                case ToolArguments(_, text):
                    call = self._last(CallItem)
                    assert call is not None, "arguments come right after their call"
                    yield from call.add(text)

    def end(self, status: Status) -> Iterator[Event]:
        """The last item ends with `status`."""
        if self.items and self.items[-1].status == "in_progress":
            yield from self.items[-1].end(status)

    def _begin(self, item: _Item) -> Iterator[Event]:
        yield from self.end("completed")
        self.items.append(item)
        yield from item.begin()

    def _last(self, kind: type[ItemT]) -> ItemT | None:
        """The item that grows, if it is of `kind`."""
        last = self.items[-1] if self.items else None
        return last if isinstance(last, kind) else None


class _ContentLogprobs:
    """Logprobs of the tokens that make content, from the place of each token in the whole text; up to the first call.

    thinks   the text begins with reasoning
    """

    def __init__(self, tokenizer: Tokenizer, *, thinks: bool) -> None:
        self._tokenizer = tokenizer
        self._num_skipped = _THINK_END_CHARS if thinks else 0
        self._num_taken = 0
        self._waiting: list[tuple[int, TokenLogprob]] = []  # (where its text begins, token)
        self._stopped = False

    def read(self, piece: Piece) -> None:
        if piece.logprobs and not self._stopped:
            entries = chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
            self._waiting += zip(piece.offsets, entries)

    def skip(self, text: str) -> None:
        """`text` is reasoning."""
        self._num_skipped += len(text)

    def stop(self) -> None:
        """What follows is a call, whose text the parser has read and not passed on."""
        self._stopped = True
        self._waiting.clear()

    def take(self, text: str) -> list[TokenLogprob]:
        """The tokens whose text begins in the next piece of content."""
        self._num_taken += len(text)
        if not self._waiting:
            return []
        end = self._num_skipped + self._num_taken
        taken = [entry for at, entry in self._waiting if self._num_skipped <= at < end]
        self._waiting = [(at, entry) for at, entry in self._waiting if at >= end]
        return taken
