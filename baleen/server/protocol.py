"""OpenAI's JSON: what a request may hold, and what answers look like. Nothing else knows these names.

Requests are pydantic models, checked strictly (no "1" for 1); null means the default. Fields nobody knows are accepted,
as OpenAI's clients add some; fields that SGLang or OpenAI know and baleen has not built are refused unless their value
asks for nothing. Answers are msgspec structs: a stream makes one per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from baleen.chat.tokenizer import Tokenizer
from baleen.config import ConfigError
from baleen.messages import SamplingParams, TokenLogprobs
from baleen.server.errors import ApiError, bad_request, validation_error
from baleen.server.generation import Choice

MAX_LOGPROBS = 20
MAX_CHOICES = 128
_GREEDY_BELOW = 1e-6  # a smaller temperature is greedy, as in SGLang

# ---- requests ---------------------------------------------------------------

Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]

# name -> the values that ask for nothing; null is always one of them
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "cache_salt": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "data_parallel_rank": (),
    "disagg_prefill_dp_rank": (),
    "ebnf": (),
    "extra_key": (),
    "json_schema": (),
    "logit_bias": ({},),
    "lora_path": (),
    "min_tokens": (0,),
    "no_stop_trim": (False,),
    "priority": (0,),
    "regex": (),
    "response_format": ({"type": "text"},),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "routed_dp_rank": (),
    "session_id": (),
    "session_params": (),
    "stop_regex": ([], ""),
    "structural_tag": (),
}


class RequestModel(BaseModel):
    """A JSON object of a request. `not_built` names known fields that are refused."""

    model_config = ConfigDict(extra="allow", strict=True)
    not_built: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def refuse_not_built(self, prefix: str = "") -> None:
        """Raises ApiError 400 naming the first field that asks for something baleen cannot do."""
        for name, value in (self.model_extra or {}).items():
            nothing = self.not_built.get(name)
            if nothing is not None and value is not None and value not in nothing:
                raise bad_request(prefix + name, "not supported by this server", "unsupported_parameter")


M = TypeVar("M", bound=RequestModel)


def parse(model: type[M], body: bytes) -> M:
    """Raises ApiError 400 naming the field."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error) from None
    request.refuse_not_built()
    return request


def parse_part(model: type[M], value: Any, prefix: str) -> M:
    """A JSON object inside a body, already decoded. Raises ApiError 400 naming the field as `prefix` + its name."""
    try:
        part = model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error, prefix) from None
    part.refuse_not_built(prefix)
    return part


class SamplingFields(RequestModel):
    """How to choose tokens: the fields all routes share."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2, allow_inf_nan=False)] | None = None  # logits / it: finite
    stop: list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stop_is_not_empty(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and "" in value:
            raise ValueError("a stop string must not be empty")
        return value

    @field_validator("top_k")
    @classmethod
    def _top_k_range(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and not 1 <= value < 2**31:
            raise ValueError("must be at least 1, or -1 for all tokens")
        return value

    def sampling(
        self, defaults: Mapping[str, Any], *, max_new_tokens: int, seed: int | None, logprobs: int | None
    ) -> SamplingParams:
        """All values decided: the request's, else `defaults`, else what changes nothing."""

        def value(name: str, neutral: float) -> Any:
            given = getattr(self, name)
            return defaults.get(name, neutral) if given is None else given

        temperature = float(value("temperature", 1.0))
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=float(value("top_p", 1.0)),
            top_k=int(value("top_k", -1)),
            min_p=float(value("min_p", 0.0)),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=float(value("repetition_penalty", 1.0)),
            seed=seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


def read_sampling_defaults(folder: str) -> dict[str, Any]:
    """What generation_config.json says of sampling. Raises ConfigError if the file is there and broken."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        values = {name: raw[name] for name in names if raw.get(name) is not None}
        if values.get("top_k") == 0:
            del values["top_k"]  # transformers' way to say all tokens
        parse_part(SamplingFields, values, "")
    except (OSError, ValueError, AttributeError, RecursionError, ApiError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "fetch it again or delete it") from error
    return values


class StreamOptions(RequestModel):
    not_built: ClassVar = {"continuous_usage_stats": (False,)}
    include_usage: bool | None = None


class OpenAIRequest(SamplingFields):
    """What chat and completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    rid: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def refuse_not_built(self, prefix: str = "") -> None:
        super().refuse_not_built(prefix)
        if self.stream_options is not None:
            if not self.stream:
                raise bad_request("stream_options", "only with stream: true")
            self.stream_options.refuse_not_built(prefix + "stream_options.")


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions. The messages' own fields are checked by `chat.encoding`."""

    not_built: ClassVar = _NOT_BUILT | {
        "audio": (),
        "continue_final_message": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "input_ids": (),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning": ({},),
        "stream_reasoning": (True,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "web_search_options": (),
    }
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    separate_reasoning: bool | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _toggles_are_bool(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in ("thinking", "enable_thinking"):
            if not isinstance((value or {}).get(name), bool | None):
                raise ValueError(f"{name} must be true or false")
        return value

    @field_validator("reasoning_effort")
    @classmethod
    def _effort_is_known(cls, value: Any) -> Any:
        known = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
        if value is None or value in known or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise ValueError(f"must be one of {', '.join(known)}, or a number")

    @property
    def thinking(self) -> bool:
        """Whether the model thinks first: the one test, for the prompt and for the answer.

        `thinking` wins over `enable_thinking`, which wins over `reasoning_effort` (all but "none" turn it on).
        """
        kwargs = self.chat_template_kwargs or {}
        for name in ("thinking", "enable_thinking"):
            if kwargs.get(name) is not None:
                return bool(kwargs[name])
        return self.reasoning_effort not in (None, "none")

    @property
    def max_new_tokens(self) -> tuple[int | None, str]:
        """The limit asked for and the name of the field that asked."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_not_built(self, prefix: str = "") -> None:
        super().refuse_not_built(prefix)
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs", "only with logprobs: true")
        for i, message in enumerate(self.messages):
            for name in ("tool_calls", "function_call", "audio", "prefix"):
                if message.get(name):
                    raise bad_request(f"messages[{i}].{name}", "not supported by this server", "unsupported_parameter")
            if message.get("role") in ("tool", "function"):
                raise bad_request(f"messages[{i}].role", "tools are not supported by this server", "unsupported_value")


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions. `prompt`: a string, ids, or a list of either."""

    not_built: ClassVar = _NOT_BUILT | {"best_of": (1,), "echo": (False,), "suffix": ("",)}
    prompt: Any
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


# ---- answers ----------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage(choices: Sequence[Choice], n: int, reasoning_tokens: int = 0) -> Usage:
    """Of a request's choices, `n` to each prompt; a prompt counts once."""
    prompt = sum(choice.num_prompt_tokens for choice in choices[::n])
    cached = sum(choice.num_cached_tokens for choice in choices[::n])
    completion = sum(choice.num_output_tokens for choice in choices)
    return Usage(
        prompt, completion, prompt + completion, PromptTokensDetails(cached), CompletionTokensDetails(reasoning_tokens)
    )


class TokenLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TokenLogprob] | UnsetType = UNSET


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    content: str
    reasoning_content: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    matched_stop: int | str | None = None


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class ChatChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    matched_stop: int | str | None = None


class Completion(msgspec.Struct):
    """Also the chunk of a stream, where `usage` is unset or null until the last."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "baleen"
    parent: None = None


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI writes -9999."""
    return max(logprob, -9999.0)


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[TokenLogprob]:
    def entry(token_id: int, logprob: float) -> TokenLogprob:
        data = tokenizer.token_bytes(token_id)
        return TokenLogprob(data.decode("utf-8", "replace"), list(data), finite(logprob))

    entries = []
    for token_id, token in zip(ids, logprobs):
        chosen = entry(token_id, token.logprob)
        chosen.top_logprobs = [entry(*top) for top in token.top]
        entries.append(chosen)
    return entries


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]
) -> CompletionLogprobs:
    def name(token_id: int) -> str:
        data = tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:  # OpenAI's spelling of a token that is not text by itself
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    tops = []
    for token_id, token in zip(ids, logprobs):
        top = {name(i): finite(logprob) for i, logprob in token.top}
        top.setdefault(name(token_id), finite(token.logprob))
        tops.append(top)
    return CompletionLogprobs(
        [name(i) for i in ids], [finite(token.logprob) for token in logprobs], tops, list(offsets)
    )
