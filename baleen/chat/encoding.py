"""The DeepSeek-V3.2 chat format: a conversation -> the prompt text the model was trained on.

    <bos>{system}<|User|>{question}<|Assistant|></think>{answer}<eos><|User|>{question}<|Assistant|><think>

A user turn already opens the answer: `<think>` if the model is to think (only after the last user turn, in thinking
mode), else `</think>`. Reasoning before the last user turn is never sent again.

Source: encoding/encoding_dsv32.py of the DeepSeek-V3.2 model repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"

Message = Mapping[str, Any]


class EncodingError(ValueError):
    """A conversation that has no prompt. `field` is the place, as in `messages[2].content`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class _Turn:
    """One message where it stands. `index` counts the caller's messages, dropped ones included."""

    index: int
    message: Message
    last_user: int
    thinking: bool

    @property
    def may_think(self) -> bool:
        """True if an answer that starts or stands here carries its reasoning."""
        return self.thinking and self.index >= self.last_user

    @property
    def content(self) -> str:
        return content_text(self.message.get("content"), f"messages[{self.index}].content")


def encode_messages(messages: Sequence[Message], *, thinking: bool) -> str:
    """The prompt that asks for the next answer. Encode it with special-token adding off: it starts with its own bos.

    messages   {"role", "content"[, "reasoning_content"]}; content is a string, a list of text parts, or None
    Raises:    EncodingError.
    """
    if not messages:
        raise EncodingError("messages", "messages must not be empty")
    last = messages[-1].get("role")
    if last not in ("user", "developer"):
        raise EncodingError(
            f"messages[{len(messages) - 1}].role",
            f"the last message must be from user or developer, to have something to answer; it is from {last!r}",
        )
    return render(messages, thinking=thinking)


def render(messages: Sequence[Message], *, thinking: bool) -> str:
    """The text of any conversation, also one that ends in an answer. Raises EncodingError."""
    last_user = max((i for i, m in enumerate(messages) if m.get("role") in ("user", "developer")), default=-1)
    parts = [BOS]
    for index, message in enumerate(messages):
        role = message.get("role")
        renderer = RENDERERS.get(role) if isinstance(role, str) else None
        if renderer is None:
            known = ", ".join(RENDERERS)
            raise EncodingError(f"messages[{index}].role", f"unknown role {role!r}; known roles: {known}")
        if thinking and role == "developer" and index < last_user:
            continue  # the format forgets a developer turn together with the reasoning that followed it
        parts.append(renderer(_Turn(index, message, last_user, thinking)))
    return "".join(parts)


def content_text(content: Any, field: str) -> str:
    """A message's content as one string: text parts are joined by one space, None is empty. Raises EncodingError."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise EncodingError(field, f"content must be a string or a list of parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise EncodingError(f"{field}[{i}].type", f"only parts of type 'text' can be read, not {kind!r}")
        if not isinstance(part.get("text"), str):
            raise EncodingError(f"{field}[{i}].text", "a text part needs its text as a string")
        texts.append(part["text"])
    return " ".join(texts)


def _system(turn: _Turn) -> str:
    return turn.content


def _user(turn: _Turn) -> str:
    if turn.message.get("content") is None:
        raise EncodingError(f"messages[{turn.index}].content", "a user message needs content")
    return USER + turn.content + ASSISTANT + (THINK_START if turn.may_think else THINK_END)


def _developer(turn: _Turn) -> str:
    if not turn.content:
        raise EncodingError(f"messages[{turn.index}].content", "a developer message needs content")
    body = f"\n\n# The user's message is: {turn.content}"
    return USER + body + ASSISTANT + (THINK_START if turn.may_think else THINK_END)


def _assistant(turn: _Turn) -> str:
    reasoning = ""
    if turn.may_think:
        reasoning = turn.message.get("reasoning_content") or ""
        if not reasoning or not isinstance(reasoning, str):
            raise EncodingError(
                f"messages[{turn.index}].reasoning_content",
                "in thinking mode an assistant message after the last user message needs its reasoning_content",
            )
        reasoning += THINK_END
    return reasoning + turn.content + EOS


RENDERERS: dict[str, Callable[[_Turn], str]] = {
    "system": _system,
    "user": _user,
    "developer": _developer,
    "assistant": _assistant,
}
