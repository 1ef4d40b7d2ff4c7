"""Anthropic's Messages API: what a request holds, and how it reads as a chat request. docs/agents.md has the rules."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from baleen.server.constraints import ConstraintFields
from baleen.server.errors import bad_request
from baleen.server.fields import REFUSED, Probability, RequestModel, parse_part
from baleen.server.protocol import ChatRequest
from baleen.server.turns import Turns, unseal

MIN_THINKING_BUDGET = 1024

# Of the chat request -> here, for `errors_about`.
CHAT_FIELDS = {
    "continue_final_message": "messages",
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "stop": "stop_sequences",
}
_REFUSED = REFUSED | {
    **dict.fromkeys(ConstraintFields.model_fields, ()),
    "compaction": (),
    "container": (),
    "fallbacks": ([],),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "thread": (),
}


class Thinking(RequestModel):
    """`budget_tokens` is checked as Anthropic does and then has no effect: the model ends its thinking itself."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING_BUDGET)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """`effort` has no effect: the model knows thinking on and off."""

    refused: ClassVar = {"task_budget": ()}
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ToolChoice(RequestModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if self.type == "tool" and self.name is None:
            raise bad_request(f"{prefix}name", "type tool needs the tool's name")

    @property
    def chat_choice(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Tool(RequestModel):
    refused: ClassVar = {"defer_loading": (False,)}
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    input_examples: list[dict[str, Any]] | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def function(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "input_examples": self.input_examples,
            "strict": self.strict,
        }
        return {name: value for name, value in function.items() if value is not None}


class PromptFields(RequestModel):
    """What makes the prompt: all of POST /v1/messages/count_tokens."""

    refused: ClassVar = _REFUSED
    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: dict[str, Any] | None = None

    @property
    def thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        for name in ("tool_choice", "thinking", "output_config"):
            part = getattr(self, name)
            if part is not None:
                part.check(f"{prefix}{name}.")
        if self.thinking is not None and self.thinking.type == "enabled" and self.thinking.budget_tokens is None:
            raise bad_request("thinking.budget_tokens", "type enabled needs it; type adaptive does without")
        edits = (self.context_management or {}).get("edits") or []
        for i, edit in enumerate(edits if isinstance(edits, list) else [edits]):
            # The prompt format itself forgets the thinking of earlier turns.
            if not isinstance(edit, dict) or edit.get("type") != "clear_thinking_20251015":
                message = "only edits of type clear_thinking_20251015 are supported"
                raise bad_request(f"context_management.edits[{i}]", message, "unsupported_value")

    def turns(self) -> Turns:
        """Raises ApiError 400 naming the block."""
        turns = Turns()
        if self.system is not None:
            turns.instruct(_text(self.system, "system"), "system")
        for i, message in enumerate(self.messages):
            _add(parse_part(MessageItem, message, f"messages[{i}]."), f"messages[{i}]", turns)
        return turns

    def chat_fields(self, turns: Turns) -> dict[str, Any]:
        """What of the chat request makes the prompt. Raises ApiError 400."""
        asked_here = self.output_config.format if self.output_config is not None else None
        output_format = self.output_format or asked_here
        choice = self.tool_choice or ToolChoice(type="auto")
        last = turns.messages[-1]
        fields = {
            "model": self.model,
            "messages": turns.messages,
            "tools": [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())] or None,
            "tool_choice": choice.chat_choice if self.tools or choice.type != "auto" else None,
            "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
            "thinking": self.thinks,
            "continue_final_message": (last["role"] == "assistant" and not last.get("tool_calls")) or None,
        }
        if output_format is not None:
            fields["response_format"] = {"type": "json_schema", "schema": output_format.schema_}
        return {name: value for name, value in fields.items() if value is not None}

    def field_names(self, turns: Turns) -> dict[str, str]:
        """For `errors_about`."""
        tools = {f"tools[{i}].function": f"tools[{i}]" for i in range(len(self.tools or ()))}
        schemas = {f"{function}.parameters": f"{tool}.input_schema" for function, tool in tools.items()}
        return CHAT_FIELDS | turns.field_names() | tools | schemas

    def chat_request(self, turns: Turns, rid: str | None = None) -> ChatRequest:
        """Raises ApiError 400."""
        return parse_part(ChatRequest, self.chat_fields(turns) | {"rid": rid}, "")


class MessagesRequest(PromptFields):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0: all tokens
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise bad_request("thinking.budget_tokens", f"must be less than max_tokens, which is {self.max_tokens}")

    def chat_fields(self, turns: Turns) -> dict[str, Any]:
        fields = {
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or None,
        }
        return super().chat_fields(turns) | {name: value for name, value in fields.items() if value is not None}


def _read_tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        message = (
            f"{kind!r} is a tool of Anthropic's own, which this server does not have; "
            "send the client's tools as type custom, with their input_schema"
        )
        raise bad_request(f"{place}.type", message, "unsupported_value")
    return {"type": "function", "function": parse_part(Tool, tool, f"{place}.").function()}


# ---- messages -------------------------------------------------------------------------------------------------------


class MessageItem(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class ToolUseBlock(RequestModel):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(RequestModel):
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None


class ThinkingBlock(RequestModel):
    thinking: str
    signature: str | None = None


def _add(message: MessageItem, place: str, turns: Turns) -> None:
    if isinstance(message.content, str):
        blocks: list[dict[str, Any]] = [{"type": "text", "text": message.content}]
    else:
        blocks = message.content
    places = [
        f"{place}.content" if blocks is not message.content else f"{place}.content[{i}]" for i in range(len(blocks))
    ]
    if message.role == "assistant":
        _add_assistant(list(zip(blocks, places)), place, turns)
    elif message.role == "user":
        _add_user(list(zip(blocks, places)), place, turns)
    else:
        turns.instruct(_text(message.content, f"{place}.content"), place)


def _add_user(blocks: list[tuple[dict[str, Any], str]], place: str, turns: Turns) -> None:
    """Tool results first: texts beside them belong to the tool loop."""
    results = [(block, at) for block, at in blocks if block.get("type") == "tool_result"]
    for block, at in results:
        result = parse_part(ToolResultBlock, block, f"{at}.")
        text = _text(result.content or "", f"{at}.content")
        turns.result(result.tool_use_id, f"Error: {text}" if result.is_error else text, at)
    texts = [_block_text(block, at) for block, at in blocks if block.get("type") != "tool_result"]
    if results:
        for text in texts:
            turns.remark(text, place)
    else:
        turns.ask("\n\n".join(texts), place)


def _add_assistant(blocks: list[tuple[dict[str, Any], str]], place: str, turns: Turns) -> None:
    thinking, texts, calls = "", [], []
    for block, at in blocks:
        match block.get("type"):
            case "thinking":
                part = parse_part(ThinkingBlock, block, f"{at}.")
                thinking += part.thinking or unseal(part.signature or "")
            case "redacted_thinking":
                pass  # of another server: only that one can read it
            case "tool_use":
                calls.append((parse_part(ToolUseBlock, block, f"{at}."), at))
            case _:
                texts.append(_block_text(block, at))
    if thinking:
        turns.think(thinking, place)
    turns.say("".join(texts), place)
    for call, at in calls:
        turns.call(call.id, call.name, json.dumps(call.input, ensure_ascii=False), at)


def _text(content: str | list[dict[str, Any]], place: str) -> str:
    """Text blocks, with an empty line between them. Raises ApiError 400 for blocks of another kind."""
    if isinstance(content, str):
        return content
    return "\n\n".join(_block_text(block, f"{place}[{i}]") for i, block in enumerate(content))


def _block_text(block: dict[str, Any], place: str) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
    message = f"a block of type {block.get('type')!r} cannot be read here: this model reads text"
    raise bad_request(f"{place}.type", message, "unsupported_value")
