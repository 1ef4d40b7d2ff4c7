"""OpenAI's Responses API: what a request holds, and how it reads as a chat request. docs/agents.md has the rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from baleen.server.errors import bad_request
from baleen.server.fields import MAX_LOGPROBS, REFUSED, Int64, RequestModel, SamplingFields, parse_part
from baleen.server.protocol import ChatRequest
from baleen.server.turns import Turns, unseal

# Tools that OpenAI's servers run. Agents offer these to every server beside their own tools: left out then.
LEFT_OUT_TOOLS = ("web_search", "image_generation")
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
# What else `include` may name: outputs of tools that this server never runs, and images.
_INCLUDES_NOTHING = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


# ---- the request ----------------------------------------------------------------------------------------------------


class ReasoningOptions(RequestModel):
    refused: ClassVar = {"mode": ("standard",), "context": ("auto", "current_turn")}
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(RequestModel):
    refused: ClassVar = {"verbosity": ("medium",)}
    format: TextFormat | None = None


class StreamOptions(RequestModel):
    refused: ClassVar = {"include_obfuscation": (False,)}


class ResponsesRequest(SamplingFields):
    """POST /v1/responses. SGLang's sampling fields work as well."""

    refused: ClassVar = REFUSED | {
        "background": (False,),
        "background_options": ({},),
        "cache_salt": ("",),
        "context_management": ([],),
        "conversation": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "request_id": (),
        "service_tier": ("auto", "default"),
    }
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # of built-in tools, of which there are none
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    seed: Int64 | None = None
    priority: Int64 | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("include")
    @classmethod
    def _known_includes(cls, value: list[str] | None) -> list[str] | None:
        known = (LOGPROBS, ENCRYPTED_REASONING, *_INCLUDES_NOTHING)
        for name in value or ():
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return value

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def wants_encrypted_reasoning(self) -> bool:
        return ENCRYPTED_REASONING in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        return self.reasoning is not None and (self.reasoning.summary or self.reasoning.generate_summary) is not None

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        for name in ("reasoning", "text", "stream_options"):
            part = getattr(self, name)
            if part is not None:
                part.check(f"{prefix}{name}.")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "only with stream: true")
        if self.truncation == "auto":
            message = 'nothing is dropped from an input that is too long; send "disabled"'
            raise bad_request("truncation", message, "unsupported_parameter")

    def chat_request(self, turns: Turns, toolbox: Toolbox, rid: str) -> ChatRequest:
        """Raises ApiError."""
        reasoning = self.reasoning or ReasoningOptions()
        chat: dict[str, Any] = {name: getattr(self, name) for name in SamplingFields.model_fields}
        chat |= {
            "model": self.model,
            "messages": turns.messages,
            "rid": rid,
            "tools": toolbox.functions or None,
            "tool_choice": toolbox.choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
            "reasoning_effort": reasoning.effort,
            "response_format": self._response_format(),
            "seed": self.seed,
            "priority": self.priority,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return parse_part(ChatRequest, {name: value for name, value in chat.items() if value is not None}, "")

    def _response_format(self) -> dict[str, Any] | None:
        text_format = self.text.format if self.text is not None else None
        if text_format is None:
            return None
        asked = text_format.model_dump(by_alias=True, exclude_none=True)
        kind = asked.pop("type")
        return {"type": kind, "json_schema": asked} if kind == "json_schema" else {"type": kind}


# Of the chat request -> here, for `errors_about`.
CHAT_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.allowed_tools": "tool_choice",
}


# ---- tools ----------------------------------------------------------------------------------------------------------


class FunctionTool(RequestModel):
    """Also inside a namespace."""

    refused: ClassVar = {"defer_loading": (False,), "async": (False,)}
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class CustomFormat(RequestModel):
    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class CustomTool(RequestModel):
    refused: ClassVar = {"defer_loading": (False,), "async": (False,)}
    name: str
    description: str | None = None
    format: CustomFormat | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def function(self) -> dict[str, Any]:
        """Its free text is the one parameter of a function; a grammar is shown to the model, not enforced."""
        description = self.description or ""
        if self.format is not None and self.format.definition:
            grammar = f"`input` must follow this grammar ({self.format.syntax}):\n{self.format.definition}"
            description = f"{description}\n\n{grammar}" if description else grammar
        schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        return {"name": self.name, "description": description, "parameters": schema}


class Namespace(RequestModel):
    name: str
    description: str | None = None
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class ToolRef:
    """What the client calls a function of the chat request."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass
class Toolbox:
    """The tools of a request.

    offered      those that the model is told of, as the client wrote them
    functions    the same for the chat request
    refs         a function's name in the chat request -> the client's name
    field_names  for `errors_about`
    """

    offered: list[dict[str, Any]] = field(default_factory=list)
    functions: list[dict[str, Any]] = field(default_factory=list)
    refs: dict[str, ToolRef] = field(default_factory=dict)
    field_names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, tools: list[dict[str, Any]] | None) -> Toolbox:
        """Raises ApiError 400 for a tool that neither the client runs nor this server."""
        box = cls()
        for i, tool in enumerate(tools or ()):
            if str(tool.get("type")).startswith(LEFT_OUT_TOOLS) and any(_client_runs(other) for other in tools or ()):
                continue
            box._add(tool, f"tools[{i}]")
            box.offered.append(tool)
        return box

    def ref(self, function: str) -> ToolRef:
        return self.refs.get(function, ToolRef(function))

    def choice(self, choice: str | dict[str, Any] | None) -> Any:
        """`tool_choice` of the chat request. Raises ApiError 400."""
        match choice:
            case None | str():
                return choice
            case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
                names = [self._chosen(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools)]
                return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}
            case _:
                return self._chosen(choice, "tool_choice")

    def _chosen(self, tool: Any, place: str) -> dict[str, Any]:
        match tool:
            case {"type": "function" | "custom", "name": str(name)}:
                return {"type": "function", "function": {"name": _function_name(tool.get("namespace"), name)}}
        message = (
            'must be "none", "auto", "required", {"type": "function" or "custom", "name": ...}, or '
            '{"type": "allowed_tools", "mode": "auto" or "required", "tools": [...]}: this server runs no tools itself'
        )
        raise bad_request(place, message)

    def _add(self, tool: dict[str, Any], place: str, namespace: str | None = None) -> None:
        kind = tool.get("type")
        if kind == "namespace" and namespace is None:
            group = parse_part(Namespace, tool, f"{place}.")
            for i, inner in enumerate(group.tools):
                about = {"description": _about(group, inner)} if i == 0 and group.description else {}
                self._add(inner | about, f"{place}.tools[{i}]", group.name)
        elif kind == "function":
            asked = parse_part(FunctionTool, tool, f"{place}.")
            shown = ("name", "description", "parameters", "strict")
            function = {name: tool[name] for name in tool if name in shown and tool[name] is not None}
            self._add_function(function, ToolRef(asked.name, namespace), place)
        elif kind == "custom":
            custom = parse_part(CustomTool, tool, f"{place}.")
            self._add_function(custom.function(), ToolRef(custom.name, namespace, custom=True), place)
        else:
            message = (
                f"a tool of type {kind!r} is not supported: this server runs no tools itself, and the client's own "
                "must be of type function, custom or namespace; remove it"
            )
            raise bad_request(f"{place}.type", message, "unsupported_value")

    def _add_function(self, function: dict[str, Any], ref: ToolRef, place: str) -> None:
        function["name"] = _function_name(ref.namespace, ref.name)
        self.field_names[f"tools[{len(self.functions)}].function"] = place
        self.field_names[f"tools[{len(self.functions)}]"] = place
        self.functions.append({"type": "function", "function": function})
        self.refs[function["name"]] = ref


def _about(group: Namespace, tool: Mapping[str, Any]) -> str:
    """The description of a group's first tool, which tells about the group as well."""
    return f"{tool.get('description') or ''}\n\n{group.name}: {group.description}".lstrip()


def _client_runs(tool: Mapping[str, Any]) -> bool:
    return tool.get("type") in ("function", "custom", "namespace")


def _function_name(namespace: Any, name: str) -> str:
    """One name for a tool of a namespace, as in mcp__files__read."""
    return f"{str(namespace).removesuffix('__')}__{name}" if namespace else name


# ---- input items ----------------------------------------------------------------------------------------------------


class MessageItem(RequestModel):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]


class ReasoningItem(RequestModel):
    content: list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


class FunctionCallItem(RequestModel):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomCallItem(RequestModel):
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class CallOutputItem(RequestModel):
    call_id: str
    output: str | list[dict[str, Any]]


def read_input(
    value: str | list[dict[str, Any]], turns: Turns, find: Callable[[str], dict[str, Any] | None], place: str = "input"
) -> None:
    """Append the items to `turns`.

    find     the stored output item of an id
    Raises:  ApiError 400 naming the item.
    """
    if isinstance(value, str):
        turns.ask(value, place)
        return
    for i, item in enumerate(value):
        here = f"{place}[{i}]"
        # Without its type an item is a message, or, as OpenAI's own clients may write it, a reference.
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "item_reference":
            found = find(str(item.get("id")))
            if found is None:
                message = f"no stored item has the id {item.get('id')!r}; send the item itself"
                raise bad_request(f"{here}.id", message, "item_not_found")
            item, kind = found, found["type"]
        reader = _READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            message = f"an item of type {kind!r} cannot be read; known types: {', '.join(_READERS)}, item_reference"
            raise bad_request(f"{here}.type", message, "unsupported_value")
        reader(item, here, turns)


def _message(item: dict[str, Any], place: str, turns: Turns) -> None:
    message = parse_part(MessageItem, item, f"{place}.")
    add = {"user": turns.ask, "assistant": turns.say}.get(message.role, turns.instruct)
    add(_text(message.content, f"{place}.content", "" if message.role == "assistant" else "\n\n"), place)


def _reasoning(item: dict[str, Any], place: str, turns: Turns) -> None:
    """The text is wherever the client kept it: in the content, in the opaque copy of it, or as summary."""
    reasoning = parse_part(ReasoningItem, item, f"{place}.")
    if reasoning.content:
        text = _text(reasoning.content, f"{place}.content", "")
    else:
        summary = _text(reasoning.summary or [], f"{place}.summary", "\n\n")
        text = unseal(reasoning.encrypted_content or "") or summary
    if text:
        turns.think(text, place)


def _function_call(item: dict[str, Any], place: str, turns: Turns) -> None:
    call = parse_part(FunctionCallItem, item, f"{place}.")
    turns.call(call.call_id, _function_name(call.namespace, call.name), call.arguments, place)


def _custom_call(item: dict[str, Any], place: str, turns: Turns) -> None:
    call = parse_part(CustomCallItem, item, f"{place}.")
    arguments = json.dumps({"input": call.input}, ensure_ascii=False)
    turns.call(call.call_id, _function_name(call.namespace, call.name), arguments, place)


def _call_output(item: dict[str, Any], place: str, turns: Turns) -> None:
    result = parse_part(CallOutputItem, item, f"{place}.")
    turns.result(result.call_id, _text(result.output, f"{place}.output", "\n\n"), place)


def _text(content: str | list[dict[str, Any]], place: str, between: str) -> str:
    """Text parts joined by `between`. Raises ApiError 400 for parts of another kind."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        match part:
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case {"type": "input_text" | "output_text" | "text" | "summary_text" | "reasoning_text", "text": str(text)}:
                texts.append(text)
            case _:
                message = f"only text can be read, not a part of type {part.get('type')!r}"
                raise bad_request(f"{place}[{i}]", message, "unsupported_value")
    return between.join(texts)


_READERS: dict[str, Callable[[dict[str, Any], str, Turns], None]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "function_call_output": _call_output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _call_output,
}
