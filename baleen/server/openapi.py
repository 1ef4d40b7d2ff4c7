"""GET /openapi.json: all routes, from the request models and answer structs that they use.

What a model's types do not say of a field is in `_FIELDS`. Tests hold the whole to what the server does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import baleen
from baleen.server import answers
from baleen.server.anthropic_protocol import MessagesRequest, PromptFields
from baleen.server.fields import SamplingFields
from baleen.server.native import GenerateBody, GenerateSampling
from baleen.server.operations import AbortBody
from baleen.server.protocol import ChatRequest, CompletionRequest
from baleen.server.responses_protocol import ResponsesRequest
from baleen.server.tokenize import DetokenizeRequest, Text, TokenizeRequest

Schema = dict[str, Any]

_REF = "#/components/schemas/"
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field, as in messages[2].content"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR: Schema = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": [*required, *properties], "properties": properties}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


_IDS = _list({"type": "integer"})
_STRINGS = _list({"type": "string"})
_FILLED: Schema = {"minItems": 1}
_NAME: Schema = {"type": "string", "minLength": 1}
_INFO: Schema = {"type": "object"}


def _or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, {"type": "null"}]}


# What validators of these fields accept beside what their types say.
_ALSO: dict[type, dict[str, Schema]] = {ChatRequest: {"thinking": {"type": "boolean"}}}
# What they accept where the types say another thing, or nothing.
_FIELDS: dict[type, dict[str, Schema]] = {
    SamplingFields: {
        "stop": _or_null(_NAME, _list(_NAME)),
        "stop_regex": _or_null(_NAME, _list(_NAME)),
        "top_k": _or_null({"const": -1}, {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**31}),
    },
    CompletionRequest: {
        "prompt": {
            "anyOf": [{"type": "string"}, _IDS | _FILLED, _list({"anyOf": [{"type": "string"}, _IDS]}) | _FILLED]
        }
    },
    GenerateBody: {
        "text": _or_null({"type": "string"}, _STRINGS | _FILLED),
        "input_ids": _or_null(_IDS | _FILLED, _list(_IDS) | _FILLED),
        "sampling_params": _or_null({"$ref": f"{_REF}GenerateSampling"}, _list({"$ref": f"{_REF}GenerateSampling"})),
        "rid": _or_null(_NAME, _list(_NAME) | _FILLED),
    },
    TokenizeRequest: {"prompt": _or_null({"type": "string"}, _STRINGS)},
    DetokenizeRequest: {"tokens": {"anyOf": [_IDS, _list(_IDS)]}},
}

_GENERATED: Schema = _object(text={"type": "string"}, output_ids=_IDS, meta_info=_INFO)
_RESPONSE: Schema = _object(
    id={"type": "string"},
    object={"const": "response"},
    status={"enum": ["completed", "incomplete", "failed", "in_progress"]},
    created_at={"type": "integer"},
    model={"type": "string"},
    output=_list({"type": "object", "required": ["id", "type", "status"]}),
)
_MESSAGE: Schema = _object(
    "stop_sequence",
    id={"type": "string"},
    type={"const": "message"},
    role={"const": "assistant"},
    model={"type": "string"},
    content=_list({"type": "object", "required": ["type"]}),
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]},
    usage=_object(input_tokens={"type": "integer"}, output_tokens={"type": "integer"}),
)
_TOKENS: Schema = _object(
    tokens={"anyOf": [_IDS, _list(_IDS)]},
    count={"anyOf": [{"type": "integer"}, _IDS]},
    max_model_len={"type": "integer"},
)
_LOAD: Schema = _object(
    "ts_tic",
    **{
        name: {"type": "integer"}
        for name in ("dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens", "num_pending_tokens")
    },
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route.

    answer   of the 200: a struct or a schema; "": an empty body; "text": plain text
    body     the model of the request
    example  of one that is answered
    streams  the answer may come as server-sent events
    errors   statuses besides those that follow from `body`
    """

    summary: str
    answer: Any
    body: type[BaseModel] | None = None
    example: Mapping[str, Any] | None = None
    streams: bool = False
    errors: tuple[int, ...] = ()
    query: Mapping[str, Schema] | None = None


_HELLO = [{"role": "user", "content": "Hello"}]
_ENGINE = (404, 499, 500, 503)
_HEALTH = Operation(summary="200 if requests are served", answer="", errors=(503,))
_SERVER_INFO = Operation(summary="Every setting, limits, and the engine's latest counters", answer=_INFO)
_MODEL_INFO = Operation(
    summary="The model that is served", answer=_object("model_path", "architectures", is_generation={"type": "boolean"})
)
_TOKENIZE = Operation(
    summary="The ids of a prompt, or of the prompt that messages make",
    body=TokenizeRequest,
    example={"prompt": "Hello"},
    answer=_TOKENS,
    errors=(404,),
)
_DETOKENIZE = Operation(
    summary="The text of ids", body=DetokenizeRequest, example={"tokens": [1, 2, 3]}, answer=Text, errors=(404,)
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("/", "GET"): Operation(summary="What runs here", answer="text"),
    ("/openapi.json", "GET"): Operation(summary="This description", answer=_INFO),
    ("/v1/chat/completions", "POST"): Operation(
        summary="OpenAI's chat completions",
        body=ChatRequest,
        example={"messages": _HELLO, "max_tokens": 16, "temperature": 0.5},
        answer=answers.ChatCompletion,
        streams=True,
        errors=_ENGINE,
    ),
    ("/v1/completions", "POST"): Operation(
        summary="OpenAI's completions",
        body=CompletionRequest,
        example={"prompt": "Once upon a time", "max_tokens": 16},
        answer=answers.Completion,
        streams=True,
        errors=_ENGINE,
    ),
    ("/v1/responses", "POST"): Operation(
        summary="OpenAI's responses",
        body=ResponsesRequest,
        example={"input": "Hello", "max_output_tokens": 16},
        answer=_RESPONSE,
        streams=True,
        errors=_ENGINE,
    ),
    ("/v1/responses/{response_id}", "GET"): Operation(summary="A stored response", answer=_RESPONSE, errors=(400, 404)),
    ("/v1/responses/{response_id}", "DELETE"): Operation(
        summary="Forget a stored response",
        answer=_object("id", "object", deleted={"type": "boolean"}),
        errors=(404,),
    ),
    ("/v1/responses/{response_id}/cancel", "POST"): Operation(
        summary="Only for background responses, of which there are none", answer=_RESPONSE, errors=(400, 404)
    ),
    ("/v1/messages", "POST"): Operation(
        summary="Anthropic's messages",
        body=MessagesRequest,
        example={"model": "default", "messages": _HELLO, "max_tokens": 16},
        answer=_MESSAGE,
        streams=True,
        errors=_ENGINE,
    ),
    ("/v1/messages/count_tokens", "POST"): Operation(
        summary="Tokens of the prompt that messages make",
        body=PromptFields,
        example={"model": "default", "messages": _HELLO},
        answer=_object(input_tokens={"type": "integer"}),
        errors=(404,),
    ),
    ("/v1/models", "GET"): Operation(summary="The model that is served", answer=answers.ModelList),
    ("/v1/models/{name}", "GET"): Operation(summary="The model of that name", answer=answers.ModelCard, errors=(404,)),
    **{
        ("/generate", method): Operation(
            summary="SGLang's own route: text or ids in, text and ids out",
            body=GenerateBody,
            example={"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16}},
            answer={"anyOf": [_GENERATED, _list(_GENERATED)]},
            streams=True,
            errors=_ENGINE,
        )
        for method in ("POST", "PUT")
    },
    ("/tokenize", "POST"): _TOKENIZE,
    ("/v1/tokenize", "POST"): _TOKENIZE,
    ("/detokenize", "POST"): _DETOKENIZE,
    ("/v1/detokenize", "POST"): _DETOKENIZE,
    ("/abort_request", "POST"): Operation(
        summary="End the requests whose rid begins so, or all; they are answered with what they have",
        body=AbortBody,
        example={"rid": "my-request"},
        answer="",
    ),
    ("/health", "GET"): _HEALTH,
    ("/health_generate", "GET"): Operation(
        summary="200 once the engine has made a token for this question", answer="", errors=(503,)
    ),
    ("/ping", "GET"): _HEALTH,
    ("/metrics", "GET"): Operation(summary="For Prometheus", answer="text"),
    ("/get_load", "GET"): Operation(summary="How busy the engine is", answer=_list(_LOAD)),
    ("/server_info", "GET"): _SERVER_INFO,
    ("/get_server_info", "GET"): _SERVER_INFO,
    ("/model_info", "GET"): _MODEL_INFO,
    ("/get_model_info", "GET"): _MODEL_INFO,
    **{
        ("/flush_cache", method): Operation(
            summary="Empty the prefix cache, if no request runs within `timeout` seconds",
            answer="text",
            errors=(400, 503),
            query={"timeout": {"type": "number", "minimum": 0}},
        )
        for method in ("GET", "POST")
    },
}


def document(*, needs_key: bool) -> Schema:
    """The whole, in OpenAPI 3.1.

    needs_key   requests must carry an API key
    """
    structs = list(dict.fromkeys(op.answer for op in OPERATIONS.values() if isinstance(op.answer, type)))
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REF + "{name}")
    models, refs = _models()
    assert not set(schemas) & set(models), "a struct and a model share a name"
    schemas |= models | {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    paths: dict[str, Schema] = {}
    for (path, method), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation, refs, needs_key=needs_key)
    components: Schema = {"schemas": schemas}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "baleen", "version": baleen.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _models() -> tuple[dict[str, Schema], dict[type[BaseModel], Schema]]:
    """The schemas of the request models and of all they are made of, by name; and the reference to each model."""
    models: list[type[BaseModel]] = [op.body for op in OPERATIONS.values() if op.body is not None]
    models = [*dict.fromkeys(models), GenerateSampling]  # that is a part of one, read for itself
    refs, whole = models_json_schema([(model, "validation") for model in models], ref_template=_REF + "{model}")
    schemas: dict[str, Schema] = whole["$defs"]
    for model in models:
        fields = schemas[refs[model, "validation"]["$ref"].removeprefix(_REF)]["properties"]
        for kind in model.__mro__:
            fields |= _FIELDS.get(kind, {})
            for name, schema in _ALSO.get(kind, {}).items():
                fields[name]["anyOf"].append(schema)
    return schemas, {model: refs[model, "validation"] for model in models}


def _operation(path: str, operation: Operation, refs: Mapping[type[BaseModel], Schema], *, needs_key: bool) -> Schema:
    shape = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    error = {"application/json": {"schema": {"$ref": _REF + shape}}}
    is_open = path.startswith(("/health", "/metrics"))
    locked = needs_key and not is_open
    statuses = {*operation.errors, *((400, 413) if operation.body is not None else ()), *((401,) if locked else ())}
    described: Schema = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "OK", **_content(operation)},
            **{str(status): {"description": _phrase(status), "content": error} for status in sorted(statuses)},
        },
        "parameters": [*_parameters(path, operation)],
    }
    if 499 in statuses:
        described["responses"]["499"].pop("content")  # nobody reads it
    if operation.body is not None:
        examples = {"short": {"value": operation.example}}
        if operation.streams:
            examples["streamed"] = {"value": {**(operation.example or {}), "stream": True}}
        content = {"application/json": {"schema": refs[operation.body], "examples": examples}}
        described["requestBody"] = {"required": True, "content": content}
    if locked:
        described["security"] = [{"key": []}]
    return described


def _phrase(status: int) -> str:
    return "The client left" if status == 499 else HTTPStatus(status).phrase


def _content(operation: Operation) -> Schema:
    answer = operation.answer
    if answer == "":
        return {}
    if answer == "text":
        return {"content": {"text/plain": {"schema": {"type": "string"}}}}
    schema = {"$ref": _REF + answer.__name__} if isinstance(answer, type) else answer
    content = {"application/json": {"schema": schema}}
    return {"content": content | ({"text/event-stream": {}} if operation.streams else {})}


def _parameters(path: str, operation: Operation) -> Iterator[Schema]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name, schema in (operation.query or {}).items():
        yield {"name": name, "in": "query", "schema": schema}
