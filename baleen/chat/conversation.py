"""A conversation as clients send it -> checked messages in one form, which every chat format reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
_ASKING_ROLES = ("user", "developer", "tool")
_OTHER_ROLES = {
    "function": "the role of OpenAI's first function calls; send the result as role 'tool', after the assistant "
    "message with its tool_calls",
    "latest_reminder": "a role of another model family; send the text in a user or system message",
}
_REFUSED_FIELDS = {
    "function_call": "OpenAI's first function calls; send tool_calls",
    "audio": "only text can be read",
    "refusal": "not part of the prompt format; send the text as content",
}


class EncodingError(ValueError):
    """A conversation that has no prompt. `field` is the place, as in `messages[2].content`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Conversation:
    """What a client asks to continue.

    messages                OpenAI's objects; the client's keys and their order are kept where they show in the prompt
    tools                   OpenAI's objects {"type": "function", "function": {...}}
    response_schema         JSON schema of the answer, to be written into the prompt
    continue_final_message  the last message is an assistant's beginning, to be continued; `"prefix": true` in that
                            message (DeepSeek's spelling) says the same
    template_kwargs         further variables of a Jinja template; every one must be one that the template reads
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool = False
    response_schema: Any = None
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offered_tools(self) -> list[Mapping[str, Any]]:
        """The request's tools and those that messages carry themselves: what the answer may call."""
        own = [message.get("tools") for message in self.messages]
        return [*self.tools, *(tool for tools in own if isinstance(tools, list) for tool in tools)]


@dataclass(frozen=True)
class Prompt:
    """text          starts with its own bos; `Tokenizer.encode` adds nothing
    in_reasoning  the text leaves a `<think>` open: the answer starts inside reasoning, and so must its parser
    """

    text: str
    in_reasoning: bool


@dataclass(frozen=True)
class ToolCall:
    """A call in an assistant's turn; `text` is the JSON object of its arguments as it came."""

    id: str | None
    name: str
    arguments: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Message:
    """One checked message. `index` is its place in the client's list, -1 if it is not there."""

    index: int
    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    tool_call_id: str | None = None

    @property
    def place(self) -> str:
        return f"messages[{self.index}]"


def to_json(value: Any, field: str) -> str:
    """As the official encoder writes JSON: `, ` and `: `, no escapes for characters beyond ASCII."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise EncodingError(field, "nested too deeply") from None


def read_messages(conversation: Conversation) -> tuple[list[Message], Message | None]:
    """The checked messages, and apart from them the final one that is to be continued, if there is one.

    Results stand in the order of their calls: by `tool_call_id` where the ids of the results are those of the calls,
    else as they came. Raises EncodingError.
    """
    check_tools(conversation.tools, "tools")
    if not conversation.messages:
        raise EncodingError("messages", "messages must not be empty")
    messages = [_read(i, message) for i, message in enumerate(conversation.messages)]
    last = messages[-1]
    for message, raw in zip(messages, conversation.messages):
        prefix = raw.get("prefix")
        if not isinstance(prefix, bool | None):
            raise EncodingError(f"{message.place}.prefix", "must be true or false")
        if prefix and (message is not last or message.role != "assistant"):
            raise EncodingError(f"{message.place}.prefix", "only the last message, from the assistant, can be a prefix")
    continues = conversation.continue_final_message or bool(conversation.messages[-1].get("prefix"))
    if continues and last.role != "assistant":
        raise EncodingError(
            "continue_final_message", f"the last message must be from assistant; it is from {last.role}"
        )
    if continues and last.calls:
        raise EncodingError(f"{last.place}.tool_calls", "a message with tool calls is complete: nothing to continue")
    messages = _with_ordered_results(messages)
    return (messages[:-1], last) if continues else (messages, None)


def check_answerable(messages: Sequence[Message], final: Message | None) -> None:
    """The next turn must be an assistant's. Raises EncodingError."""
    last = messages[-1] if messages else None
    if last is not None and last.role in _ASKING_ROLES:
        return
    if final is not None:
        raise EncodingError(
            f"{final.place}.role", "before the message to continue there must be one to answer, from user or tool"
        )
    assert last is not None
    if last.calls:
        raise EncodingError(
            f"{last.place}.tool_calls", "no results yet: append a message of role tool for each call, in their order"
        )
    fix = "append a user message"
    if last.role == "assistant":
        fix += ", or send continue_final_message: true to have it continued"
    raise EncodingError(
        f"{last.place}.role",
        f"the last message is from {last.role}, which leaves nothing to answer: {fix}",
    )


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


def check_tools(tools: Any, field: str) -> None:
    """Raises EncodingError unless `tools` is a list of function tools, each with its name."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise EncodingError(field, "must be a list of tools")
    for i, tool in enumerate(tools):
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind != "function":
            raise EncodingError(f"{field}[{i}].type", f"only tools of type 'function' can be offered, not {kind!r}")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise EncodingError(f"{field}[{i}].function", "must be an object with name, description and parameters")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise EncodingError(f"{field}[{i}].function.name", "a function needs a name")


def check_text(conversation: Conversation, text: str) -> None:
    """Raises EncodingError, with the place if it can be found, where `text` has half a surrogate pair."""
    if _is_text(text):
        return
    for name in ("messages", "tools", "response_schema"):
        place = _find_surrogate(getattr(conversation, name), name)
        if place is not None:
            raise EncodingError(place, "a lone surrogate (half of a \\ud83d\\ude00 pair) is not text")
    raise EncodingError("messages", "a lone surrogate (half of a \\ud83d\\ude00 pair) is not text")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_surrogate(value: Any, place: str) -> str | None:
    if isinstance(value, str):
        return None if _is_text(value) else place
    if isinstance(value, Mapping):
        if not all(_is_text(key) for key in value):
            return place
        children = [(child, f"{place}.{key}") for key, child in value.items()]
    else:
        items = value if isinstance(value, Sequence) else ()
        children = [(child, f"{place}[{i}]") for i, child in enumerate(items)]
    return next((found for child, name in children if (found := _find_surrogate(child, name)) is not None), None)


# ---- one message -----------------------------------------------------------------------------------------------------


def _read(index: int, raw: Any) -> Message:
    place = f"messages[{index}]"
    if not isinstance(raw, Mapping):
        raise EncodingError(place, f"a message must be an object, not {type(raw).__name__}")
    role = raw.get("role")
    role = role.lower() if isinstance(role, str) else role
    if role not in ROLES:
        problem = _OTHER_ROLES.get(role) if isinstance(role, str) else None
        raise EncodingError(
            f"{place}.role", f"{role!r} is {problem or 'not a role; the roles are ' + ', '.join(ROLES)}"
        )
    for name, fix in _REFUSED_FIELDS.items():
        if raw.get(name):
            raise EncodingError(f"{place}.{name}", f"not supported: {fix}")
    content = content_text(raw.get("content"), f"{place}.content")
    if role == "user" and raw.get("content") is None:
        raise EncodingError(f"{place}.content", "a user message needs content")
    if role == "developer" and not content:
        raise EncodingError(f"{place}.content", "a developer message needs content")
    if raw.get("tool_calls") and role != "assistant":
        raise EncodingError(f"{place}.tool_calls", "only an assistant message calls tools")
    tools, response_format = raw.get("tools"), raw.get("response_format")
    for name, value in (("tools", tools), ("response_format", response_format)):
        if value and role not in ("system", "developer"):
            raise EncodingError(f"{place}.{name}", "only a system or developer message carries its own")
    if tools:
        check_tools(tools, f"{place}.tools")
    call_id = raw.get("tool_call_id")
    if not isinstance(call_id, str | None):
        raise EncodingError(f"{place}.tool_call_id", "must be a string")
    return Message(
        index=index,
        role=role,
        content=content,
        reasoning=_reasoning(raw, place) if role == "assistant" else "",
        calls=_calls(raw.get("tool_calls"), f"{place}.tool_calls"),
        tools=tuple(tools or ()),
        response_format=response_format,
        tool_call_id=call_id,
    )


def _reasoning(raw: Mapping[str, Any], place: str) -> str:
    """`reasoning` is another spelling of `reasoning_content`; answers carry both, so both may come back."""
    for name in ("reasoning_content", "reasoning"):
        if not isinstance(raw.get(name), str | None):
            raise EncodingError(f"{place}.{name}", "must be a string")
    return raw.get("reasoning_content") or raw.get("reasoning") or ""


def _calls(value: Any, field: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise EncodingError(field, "must be a list of tool calls")
    calls = []
    for i, call in enumerate(value):
        place = f"{field}[{i}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise EncodingError(f"{place}.function", "must be an object with name and arguments")
        name, call_id = function.get("name"), call.get("id")
        if not isinstance(name, str) or not name:
            raise EncodingError(f"{place}.function.name", "a tool call needs the function's name")
        if not isinstance(call_id, str | None):
            raise EncodingError(f"{place}.id", "must be a string")
        arguments, text = _arguments(function.get("arguments"), f"{place}.function.arguments")
        calls.append(ToolCall(call_id, name, arguments, text))
    return tuple(calls)


def _arguments(value: Any, field: str) -> tuple[dict[str, Any], str]:
    """The object and its JSON. No text at all is how some clients write a call without arguments."""
    if value is None or value == "":
        return {}, "{}"
    text = value if isinstance(value, str) else to_json(value, field)
    try:
        arguments = json.loads(text, parse_constant=_no_constant) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise EncodingError(field, f"must be valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise EncodingError(field, f"must be a JSON object, not {type(arguments).__name__}")
    if not _is_text(to_json(arguments, field)):
        raise EncodingError(field, "a lone surrogate (half of a \\ud83d\\ude00 pair) is not text")
    return arguments, text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# ---- results ---------------------------------------------------------------------------------------------------------


def _with_ordered_results(messages: list[Message]) -> list[Message]:
    """Every run of tool messages must follow the calls it answers, with a result for each.

    Calls may also have no result at all: the user spoke before the tools did.
    """
    ordered: list[Message] = []
    results: list[Message] = []
    for message in [*messages, None]:
        if message is not None and message.role == "tool":
            results.append(message)
            continue
        if results:
            ordered += _in_order(results, ordered[-1].calls if ordered else ())
            results = []
        if message is not None:
            ordered.append(message)
    return ordered


def _in_order(results: list[Message], calls: tuple[ToolCall, ...]) -> list[Message]:
    if not calls:
        problem = "a tool message must follow the assistant message whose tool_calls it answers"
        raise EncodingError(f"{results[0].place}.role", problem)
    if len(results) > len(calls):
        raise EncodingError(results[len(calls)].place, f"one result too many: there are {len(calls)} tool calls")
    if len(results) < len(calls):
        answered = {result.tool_call_id for result in results}
        missing = [call.id or call.name for call in calls if call.id not in answered]
        problem = f"{len(calls)} tool calls but {len(results)} results; missing: {', '.join(missing)}"
        raise EncodingError(f"{results[-1].place}.tool_call_id", problem)
    by_id = {result.tool_call_id: result for result in results}
    if len(by_id) == len(calls) and by_id.keys() == {call.id for call in calls}:
        return [by_id[call.id] for call in calls]
    return results
