"""Another API's conversation -> the messages of a chat request. The Responses and the Anthropic routes share it.

The V3.2 format knows a system text only at the start, one user text to a turn, and forgets the reasoning of a tool loop
with the next user turn. So:

- system and developer texts at the start are one system message; a later one joins the user turn or the tool result it
  follows;
- user texts that follow each other are one turn;
- a text that comes together with tool results joins the last result: the loop, and its reasoning, go on.

Joined texts have an empty line between them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from baleen.chat.conversation import EncodingError
from baleen.server.errors import ApiError, bad_request

Message = dict[str, Any]
_SEAL = "baleen-"


class Turns:
    """The messages so far. `origins` says of each which field of the request it (or its beginning) came from.

    before   messages of an earlier exchange, kept as they are; `origin` stands for all of them
    """

    def __init__(self, before: Sequence[Message] = (), origin: str = "") -> None:
        self.messages: list[Message] = [dict(message) for message in before]
        self.origins = [origin] * len(self.messages)

    def instruct(self, text: str, origin: str) -> None:
        """A system or developer text."""
        if all(message["role"] == "system" for message in self.messages):
            self._join("system", text, origin)
        elif self.messages[-1]["role"] == "assistant":
            self._add({"role": "user", "content": text}, origin)
        else:
            self._join(self.messages[-1]["role"], text, origin)

    def ask(self, text: str, origin: str) -> None:
        """A user text."""
        self._join("user", text, origin)

    def remark(self, text: str, origin: str) -> None:
        """A user text that came together with the tool results before it."""
        self._join("tool", text, origin)

    def think(self, text: str, origin: str) -> None:
        """Reasoning of the assistant."""
        message = self._assistant(origin)
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def say(self, text: str, origin: str) -> None:
        """Content of the assistant."""
        self._assistant(origin)
        self._join("assistant", text, origin)

    def call(self, call_id: str, name: str, arguments: str, origin: str) -> None:
        """A tool call of the assistant. What is no JSON object, as a model may write it, is kept as one parameter."""
        if not is_object(arguments):
            arguments = json.dumps({"arguments": arguments}, ensure_ascii=False)
        message = self._assistant(origin)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        message["tool_calls"] = [*message.get("tool_calls", ()), call]

    def result(self, call_id: str, text: str, origin: str) -> None:
        """What a call gave."""
        self._add({"role": "tool", "tool_call_id": call_id, "content": text}, origin)

    def headed(self, instructions: str | None, origin: str) -> Turns:
        """A copy with `instructions` before everything."""
        copy = Turns(self.messages)
        copy.origins = list(self.origins)
        if instructions and copy.messages and copy.messages[0]["role"] == "system":
            copy.messages[0]["content"] = f"{instructions}\n\n{copy.messages[0]['content']}"
        elif instructions:
            copy.messages.insert(0, {"role": "system", "content": instructions})
            copy.origins.insert(0, origin)
        return copy

    def field_names(self) -> dict[str, str]:
        """A field of the chat request -> the field it came from, for `errors_about`."""
        return {f"messages[{i}]": origin for i, origin in enumerate(self.origins)}

    def _assistant(self, origin: str) -> Message:
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return self._add({"role": "assistant", "content": ""}, origin)

    def _join(self, role: str, text: str, origin: str) -> None:
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != role:
            self._add({"role": role, "content": text}, origin)
        elif text:
            last["content"] = f"{last['content']}\n\n{text}" if last["content"] else text

    def _add(self, message: Message, origin: str) -> Message:
        self.messages.append(message)
        self.origins.append(origin)
        return message


def is_object(text: str) -> bool:
    """Whether `text` is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def errors_about(fields: Mapping[str, str]) -> Iterator[None]:
    """Let errors about the chat request name the client's own field.

    fields   the beginning of a field's name in the chat request -> what stands there in the client's; of several that
             fit, the longest counts
    """
    try:
        yield
    except EncodingError as error:
        raise _renamed(bad_request(error.field, str(error)), fields) from None
    except ApiError as error:
        raise _renamed(error, fields) from None


def _renamed(error: ApiError, fields: Mapping[str, str]) -> ApiError:
    param = error.param or ""
    fits = [name for name in fields if param == name or param.startswith((name + ".", name + "["))]
    if not fits:
        return error
    found = max(fits, key=len)
    field = fields[found] + param[len(found) :]
    message = field + error.message.removeprefix(param) if error.message.startswith(param) else error.message
    return ApiError(error.status, message, param=field, code=error.code)


def seal(text: str) -> str:
    """Reasoning as one opaque word, for the fields that clients send back unread.

    Nothing is secret in it: the same client may ask for the text itself.
    """
    return _SEAL + base64.b64encode(text.encode()).decode()


def unseal(word: str) -> str:
    """The inverse of `seal`; "" for what another server made, which nobody can read here."""
    if not word.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(word[len(_SEAL) :], validate=True).decode()
    except ValueError:
        return ""
