"""The model's text -> reasoning, content and tool calls, as it arrives. docs/output_parsing.md has the rules.

Whatever the chunks, the events are those of the whole text: a decision is made only when no further text can change it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

import msgspec

from baleen.chat.call_formats import CALL_FORMATS, REASONING_END, SPACE
from baleen.chat.partial_json import JsonReader, begun_json_value, json_value


class Reasoning(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers."""

    text: str


class Content(msgspec.Struct, frozen=True):
    """More of the answer."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """Call number `index` (0, 1, 2 ... in the order of the text) begins; it ends before the next event that is not its
    own `ToolArguments`.
    """

    index: int
    name: str


class ToolArguments(msgspec.Struct, frozen=True):
    """More of the arguments of call `index`. All of a call joined are one JSON object; an incomplete one if the output
    was cut, or went wrong in the middle of the call.
    """

    index: int
    text: str


Event = Reasoning | Content | ToolCall | ToolArguments


class OutputParser:
    """The parser of one answer. Give it the text with `push`, then call `finish`.

    tool_parser    the format of the calls; None: tags of calls are text as any other
    in_reasoning   at first: the prompt ended in `<think>`. Then: the text so far has not ended the reasoning
    functions      the names of the functions that may be called; the call of another is text
    num_calls      calls begun so far
    """

    def __init__(
        self,
        *,
        tool_parser: Literal["deepseekv32", "deepseekv31"] | None,
        in_reasoning: bool,
        functions: Collection[str] = (),
    ) -> None:
        self.in_reasoning = in_reasoning
        self.num_calls = 0
        self._format = CALL_FORMATS[tool_parser] if tool_parser is not None else None
        self._functions = frozenset(functions)
        self._state = "text"  # what is being read: a key of _READ
        self._in_block = False  # a call has begun, and no tag has ended its block
        self._rest = ""  # the end of the text so far, not yet decided
        self._searched = 0  # the rest is known to have no end of a value before here
        self._json = JsonReader()
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """What `text` makes certain. Neighbours of one kind are one event; no event has an empty text."""
        if self._state == "text" and not self._rest and text and "<" not in text and text[-1] != "\n":
            return [Reasoning(text) if self.in_reasoning else Content(text)]
        self._rest += text
        while _READ[self._state](self):
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        rest, self._rest = self._rest, ""
        if self._state == "string":
            self._add_arguments(_escaped(rest))
        elif self._state == "value":
            self._add_arguments(begun_json_value(rest))
        elif self._state == "json":
            self._add_arguments(rest)
        elif self._state == "text" or rest.strip(SPACE):
            self._add_text(rest)
        events, self._events = self._events, []
        return events

    # ---- states: each reads from the rest, and returns whether another step is possible without more text

    def _read_text(self) -> bool:
        """Outside of calls, up to the next tag."""
        form, rest = self._format, self._rest
        tags = [REASONING_END] if self.in_reasoning else []
        if form is not None:
            tags += [form.call, form.block_end] if self._in_block else [form.call]
        tag = None
        at = rest.find("<") if tags else -1
        while at >= 0 and (tag := self._tag(tags, at)) is None:
            at = rest.find("<", at + 1)
        end = len(rest) if tag is None else at
        if form is not None and (tag is None or tag.re is not REASONING_END or tag.partial):
            newlines = min(form.newlines, end - len(rest[:end].rstrip("\n")))
            end -= newlines
        self._add_text(rest[:end])
        if tag is None or tag.partial:
            self._rest = rest[end:]
            return False
        if tag.re is REASONING_END:
            self._rest = rest[tag.end() :]
            self.in_reasoning = self._in_block = False
            return True
        return self._take(tag)

    def _read_gap(self) -> bool:
        """After a call: another one, or the end of the block."""
        assert self._format is not None
        return self._read_tag([self._format.call, self._format.block_end])

    def _read_json_end(self) -> bool:
        """After the JSON of a call: its closing tag, or what follows if that is missing."""
        assert self._format is not None
        return self._read_tag([self._format.call_end, self._format.call, self._format.block_end])

    def _read_parameters(self) -> bool:
        """After a parameter: another one, or the end of the call, or what shows that its closing tag is missing."""
        form = self._format
        assert form is not None
        return self._read_tag([form.parameter, form.call_end, form.call, form.block_end])

    def _read_string(self) -> bool:
        """A parameter's text, passed on as it comes."""
        rest = self._rest
        end = self._value_end()
        self._add_arguments(_escaped(rest[: len(rest) if end is None else end.start()]))
        if end is None or end.partial:
            self._rest = rest[len(rest) if end is None else end.start() :]
            return False
        self._add_arguments('"')
        self._rest = rest[end.end() :]
        self._state = "parameters"
        return True

    def _read_value(self) -> bool:
        """A parameter's JSON value, passed on when it is whole and known to be JSON."""
        rest = self._rest
        end = self._value_end(self._searched)
        if end is None or end.partial:
            self._searched = len(rest) if end is None else end.start()
            return False
        self._add_arguments(json_value(rest[: end.start()]))
        self._rest = rest[end.end() :]
        self._state = "parameters"
        return True

    def _read_json(self) -> bool:
        """A call's arguments as JSON, passed on as they come."""
        text, end = self._json.push(self._rest)
        self._add_arguments(text)
        self._rest = self._rest[end:]
        if self._json.done:
            self._state = "json_end"
        elif self._json.failed:
            self._state = "text"
        return self._json.done or self._json.failed

    # ---- tags

    def _read_tag(self, tags: list[Any]) -> bool:
        """Take one of `tags`, with the space before it. If something else stands there, it is text."""
        rest = self._rest
        at = len(rest) - len(rest.lstrip(SPACE))
        if at == len(rest):
            return False
        tag = self._tag(tags, at)
        if tag is None:
            self._state = "text"
            return True
        return not tag.partial and self._take(tag)

    def _tag(self, tags: list[Any], at: int) -> Any:
        """The match of the tag at `at`, or of what may become one; None if there is none."""
        for tag in tags:
            match = tag.match(self._rest, at, partial=True)
            if match is not None and (
                match.partial or "name" not in tag.groupindex or match["name"] in self._functions
            ):
                return match
        return None

    def _value_end(self, start: int = 0) -> Any:
        """The match of the tag that ends a parameter, or of what may become it; None if there is none."""
        assert self._format is not None
        at = self._rest.find("<", start)
        while at >= 0:
            match = self._format.value_end.match(self._rest, at, partial=True)
            if match is not None:
                return match
            at = self._rest.find("<", at + 1)
        return None

    def _take(self, tag: Any) -> bool:
        """Do what a whole tag says."""
        form = self._format
        assert form is not None
        self._rest = self._rest[tag.end() :]
        if tag.re is form.parameter:
            self._begin_parameter(tag, ", ")
            return True
        if self._state == "parameters":  # whatever tag it is, the call is over
            self._add_arguments("}")
        self._state = "gap"
        if tag.re is form.block_end:
            self._in_block = False
            self._state = "text"
        elif tag.re is form.call:
            self._begin_call(tag)
        return True

    def _begin_call(self, tag: Any) -> None:
        self._in_block = True
        self._events.append(ToolCall(self.num_calls, tag["name"]))
        self.num_calls += 1
        body = tag.lastgroup
        if body == "empty":
            self._add_arguments("{}")
        elif body == "json":
            self._json = JsonReader()
            self._rest = tag["json"] + self._rest
            self._state = "json"
        else:
            self._begin_parameter(tag, "{")

    def _begin_parameter(self, tag: Any, before: str) -> None:
        self._add_arguments(f"{before}{json.dumps(tag['key'], ensure_ascii=False)}: ")
        self._searched = 0
        self._state = "value"
        if tag["string"] == "true":
            self._state = "string"
            self._add_arguments('"')

    # ---- events

    def _add_text(self, text: str) -> None:
        if not text:
            return
        kind = Reasoning if self.in_reasoning else Content
        last = self._events[-1] if self._events else None
        if isinstance(last, kind):
            self._events[-1] = kind(last.text + text)
        else:
            self._events.append(kind(text))

    def _add_arguments(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, ToolArguments):
            self._events[-1] = ToolArguments(last.index, last.text + text)
        elif text:
            self._events.append(ToolArguments(self.num_calls - 1, text))


_READ = {
    "text": OutputParser._read_text,
    "gap": OutputParser._read_gap,
    "parameters": OutputParser._read_parameters,
    "string": OutputParser._read_string,
    "value": OutputParser._read_value,
    "json": OutputParser._read_json,
    "json_end": OutputParser._read_json_end,
}


def _escaped(text: str) -> str:
    """`text` as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
