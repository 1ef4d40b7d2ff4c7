"""What answers look like, as msgspec structs: a stream makes one per token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from baleen.chat.detokenizer import Detokenizer
from baleen.chat.tokenizer import Tokenizer
from baleen.messages import TokenLogprobs
from baleen.server.generation import Choice, Piece


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    """OpenAI's, and SGLang's `reasoning_tokens` at the top, the same number as in the details."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    reasoning_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage(choices: Sequence[Choice], n: int) -> Usage:
    """Of a request's choices, `n` to each prompt; a prompt counts once."""
    prompt = sum(choice.num_prompt_tokens for choice in choices[::n])
    cached = sum(choice.num_cached_tokens for choice in choices[::n])
    completion = sum(choice.num_output_tokens for choice in choices)
    reasoning = sum(choice.num_reasoning_tokens for choice in choices)
    details = PromptTokensDetails(cached), CompletionTokensDetails(reasoning)
    return Usage(prompt, completion, prompt + completion, reasoning, *details)


class TokenLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TokenLogprob] | UnsetType = UNSET


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """A call, or in a stream a part of it: `id`, `type` and the name come with its first part alone."""

    index: int
    function: FunctionCall
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    """`content` is "" where there is none, beside calls too. The reasoning has both of its names, null if not split."""

    content: str
    reasoning_content: str | None
    reasoning: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    matched_stop: int | str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    meta_info: dict[str, Any] | UnsetType = UNSET


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
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


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
    """With `echo`, the first token of the prompt has null: nothing predicts it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    matched_stop: int | str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    meta_info: dict[str, Any] | UnsetType = UNSET


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
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
) -> CompletionLogprobs:
    def name(token_id: int) -> str:
        data = tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:  # OpenAI's spelling of a token that is not text by itself
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    tops: list[dict[str, float] | None] = []
    for token_id, token in zip(ids, logprobs):
        if token is None:
            tops.append(None)
            continue
        top = {name(i): finite(logprob) for i, logprob in token.top}
        top.setdefault(name(token_id), finite(token.logprob))
        tops.append(top)
    chosen = [None if token is None else finite(token.logprob) for token in logprobs]
    return CompletionLogprobs([name(i) for i in ids], chosen, tops, list(offsets))


def prompt_text(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The prompt's text, special tokens included, and where each of its tokens' text begins in characters."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    text, offsets = "", []
    for token_id in prompt_ids:
        offsets.append(detokenizer.num_chars)
        text += detokenizer.push((token_id,))
    return text + detokenizer.finish(), offsets


def meta_info(choice: Choice, rid: str, last: Piece, arrived: float) -> dict[str, Any]:
    """SGLang's, of what has been said up to `last`, the choice's latest piece.

    arrived   time.perf_counter() when the HTTP request came
    """
    reason: dict[str, Any] | None = None
    match last.finish_reason:
        case "stop":
            reason = {"type": "stop", "matched": last.matched}
        case "length":
            reason = {"type": "length", "length": choice.num_output_tokens}
        case "abort":
            reason = {"type": "abort", "message": last.message}
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": reason,
        "prompt_tokens": choice.num_prompt_tokens,
        "completion_tokens": choice.num_output_tokens,
        "reasoning_tokens": choice.num_reasoning_tokens,
        "cached_tokens": choice.num_cached_tokens,
        "weight_version": "default",
    }
    if reason is not None:
        meta["e2e_latency"] = time.perf_counter() - arrived
    return meta
