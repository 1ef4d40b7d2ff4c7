"""The requests of /v1/chat/completions and /v1/completions. Nothing else knows OpenAI's field names."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator

from baleen.messages import Grammar
from baleen.server.constraints import ConstraintFields, ResponseFormat, ToolUse, tool_use
from baleen.server.errors import bad_request
from baleen.server.fields import MAX_CHOICES, MAX_LOGPROBS, REFUSED, Int64, NumTokens, RequestModel, TokenId

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _is_effort(value: Any) -> Any:
    if value is None or value in _EFFORTS or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"must be one of {', '.join(_EFFORTS)}, or a number")


# Not unions of types: pydantic's complaint about one would not name the field.
Effort = Annotated[
    Any,
    AfterValidator(_is_effort),
    WithJsonSchema({"anyOf": [{"enum": list(_EFFORTS)}, {"type": "number"}, {"type": "null"}]}),
]
ToolChoice = Annotated[
    Any,  # read by `constraints.tool_use`
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]}),
]

_REFUSED = REFUSED | {
    "cache_salt": ("",),
    "return_cached_tokens_details": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


class StreamOptions(RequestModel):
    refused: ClassVar = {"include_obfuscation": (False,)}
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIRequest(ConstraintFields):
    """What chat and completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NumTokens | None = None
    min_tokens: NumTokens | None = None
    response_format: ResponseFormat | None = None
    priority: Int64 | None = None
    rid: Annotated[str, Field(min_length=1)] | None = None
    return_prompt_token_ids: bool | None = None
    return_meta_info: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    def constraints(self, prefix: str = "") -> dict[str, Grammar]:
        found = super().constraints(prefix)
        grammar = self.response_format.grammar() if self.response_format is not None else None
        return found if grammar is None else {"response_format": grammar} | found

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if self.stream_options is not None:
            if not self.stream:
                raise bad_request("stream_options", "only with stream: true")
            self.stream_options.check(prefix + "stream_options.")
        for name in ("return_prompt_token_ids", "return_meta_info"):
            if self.stream and getattr(self, name):
                raise bad_request(name, "only without stream")


class Thinking(RequestModel):
    """DeepSeek's own switch; in a request also true and false."""

    refused: ClassVar = {"budget_tokens": ()}
    type: Literal["enabled", "disabled", "adaptive"]


class Reasoning(RequestModel):
    """Another spelling of the same: {"effort", "enabled", "exclude"}, with SGLang's older names for the first two."""

    refused: ClassVar = {"max_tokens": ()}
    effort: Effort = None
    reasoning_effort: Effort = None
    enabled: bool | None = None
    enable: bool | None = None
    exclude: bool | None = None


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions. The messages' own fields are checked by `chat.encoding`."""

    refused: ClassVar = _REFUSED | {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "task": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: list[dict[str, Any]] = Field(min_length=1)
    input_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: Thinking | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: Effort = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    include_reasoning: bool | None = None
    continue_final_message: bool | None = None

    @field_validator("thinking", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {"type": "enabled" if value else "disabled"} if isinstance(value, bool) else value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_kwargs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in ("thinking", "enable_thinking"):
            if not isinstance((value or {}).get(name), bool | None):
                raise ValueError(f"{name} must be true or false")
        _is_effort((value or {}).get("reasoning_effort"))
        if (value or {}).get("force_nonempty_content"):
            raise ValueError("force_nonempty_content is not supported by this server")
        return value

    @property
    def wants_thinking(self) -> bool:
        """Whether the model shall think first. Of several fields that say so, the first of this list counts:

        chat_template_kwargs.thinking, chat_template_kwargs.enable_thinking, thinking, reasoning.enabled,
        chat_template_kwargs.reasoning_effort, reasoning_effort, reasoning.effort (any but "none" turns it on).
        """
        kwargs = self.chat_template_kwargs or {}
        reasoning = self.reasoning or Reasoning()
        thinking = None if self.thinking is None else self.thinking.type != "disabled"
        switches = (kwargs.get("thinking"), kwargs.get("enable_thinking"), thinking)
        for switch in (*switches, reasoning.enabled, reasoning.enable):
            if switch is not None:
                return bool(switch)
        efforts = (kwargs.get("reasoning_effort"), self.reasoning_effort, reasoning.effort, reasoning.reasoning_effort)
        return next((effort for effort in efforts if effort is not None), "none") != "none"

    @property
    def shows_reasoning(self) -> bool:
        """Whether the answer carries the reasoning, if it is kept apart from the content."""
        return self.include_reasoning is not False and not (self.reasoning is not None and self.reasoning.exclude)

    @cached_property
    def tool_use(self) -> ToolUse:
        """Of the request's tools and of those that system and developer messages carry. Raises ApiError 400."""
        tools = {f"tools[{i}]": tool for i, tool in enumerate(self.tools or ())}
        for i, message in enumerate(self.messages):
            own = message.get("tools")
            if isinstance(own, list):
                tools |= {f"messages[{i}].tools[{j}]": tool for j, tool in enumerate(own)}
        return tool_use(tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def response_schema(self) -> dict[str, Any] | None:
        """What `response_format` of type json_schema asks for, to be written into the prompt. Raises ApiError 400."""
        return self.response_format.schema_asked if self.response_format is not None else None

    @property
    def max_new_tokens(self) -> tuple[int | None, str]:
        """The limit asked for and the name of the field that asked."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs", "only with logprobs: true")
        if self.input_ids is not None and self.continue_final_message:
            raise bad_request("continue_final_message", "not with input_ids, which are the whole prompt")
        for name, part in (("reasoning", self.reasoning), ("thinking", self.thinking)):
            if part is not None:
                part.check(f"{prefix}{name}.")
        constraint, grammar = self.constraint()
        if self.tool_use.callable and grammar is not None and grammar.kind != "json_schema":
            message = 'cannot be combined with tools that may be called; send tool_choice "none", or leave one out'
            raise bad_request(str(constraint), message)


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions. `prompt`: a string, ids, or a list of either."""

    refused: ClassVar = _REFUSED | {"suffix": ("",)}
    prompt: Any
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompt_has_a_known_form(cls, value: Any) -> Any:
        def is_ids(item: Any) -> bool:
            return isinstance(item, list) and all(type(i) is int for i in item)

        if isinstance(value, str) or (value and is_ids(value)):
            return [value]
        if isinstance(value, list) and value and all(isinstance(p, str) or is_ids(p) for p in value):
            return value
        raise ValueError("must be a string, a list of token ids, or a non-empty list of either")

    @property
    def prompts(self) -> list[str | list[int]]:
        return self.prompt

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if self.best_of not in (None, self.choices_per_prompt):
            raise bad_request("best_of", "not supported by this server but with n's value", "unsupported_parameter")
