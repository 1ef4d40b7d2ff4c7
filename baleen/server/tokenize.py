"""POST /tokenize and /detokenize: the ids that this server makes of a prompt or of messages, and back."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from fastapi import Request, Response
from pydantic import field_validator

from baleen.server import fields
from baleen.server.errors import ApiError
from baleen.server.fields import RequestModel
from baleen.server.generation import Service
from baleen.server.prompt import encode_chat
from baleen.server.protocol import ChatRequest
from baleen.server.stream import json_response, read_json


class TokenizeRequest(RequestModel):
    """Either `prompt`, or `messages` with all that a chat request may have besides (see `ChatRequest`).

    add_special_tokens   no effect: a prompt's ids are those of /v1/completions, where a text brings its own bos
    """

    refused: ClassVar = {"add_generation_prompt": (True,), "return_token_strs": (False,)}
    model: str | None = None
    prompt: Any = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _text_or_texts(cls, value: Any) -> Any:
        texts = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(text, str) for text in texts):
            raise ValueError("must be a string or a list of strings")
        return value

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "send either `prompt`, a string or a list of strings, or `messages`", param="prompt")


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[Any]
    skip_special_tokens: bool | None = None

    @field_validator("tokens")
    @classmethod
    def _ids_or_lists_of_ids(cls, value: list[Any]) -> list[Any]:
        lists = value if value and isinstance(value[0], list) else [value]
        if not all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in lists):
            raise ValueError("must be a list of token ids, or a list of such lists")
        return value


class Tokens(msgspec.Struct):
    """A list of prompts gets lists. max_model_len: tokens one request may have, prompt and answer."""

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int


class Text(msgspec.Struct):
    text: str | list[str]


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_json(request)
    asked = fields.parse(TokenizeRequest, body)
    service.check_model(asked.model)
    if asked.messages is not None:
        ids = (await encode_chat(service, fields.parse(ChatRequest, body))).input_ids
        return json_response(Tokens(ids, len(ids), service.max_tokens))
    if isinstance(asked.prompt, str):
        ids = await service.encode(asked.prompt, "prompt")
        return json_response(Tokens(ids, len(ids), service.max_tokens))
    each = [await service.encode(text, f"prompt[{i}]") for i, text in enumerate(asked.prompt or ())]
    return json_response(Tokens(each, [len(ids) for ids in each], service.max_tokens))


async def detokenize(request: Request) -> Response:
    """Bytes that are no whole character become U+FFFD."""
    service: Service = request.app.state.service
    asked = fields.parse(DetokenizeRequest, await read_json(request))
    service.check_model(asked.model)
    hidden = service.tokenizer.special_ids if asked.skip_special_tokens is not False else frozenset()

    def text(ids: list[int], param: str) -> str:
        service.check_ids(ids, param)
        data = b"".join(service.tokenizer.token_bytes(i) for i in ids if i not in hidden)
        return data.decode("utf-8", "replace")

    if asked.tokens and isinstance(asked.tokens[0], list):
        return json_response(Text([text(ids, f"tokens[{i}]") for i, ids in enumerate(asked.tokens)]))
    return json_response(Text(text(asked.tokens, "tokens")))
