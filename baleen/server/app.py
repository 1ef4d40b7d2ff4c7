"""The routes, and the application they make."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response

from baleen.chat.tokenizer import Tokenizer
from baleen.config import Config
from baleen.server import errors, middleware, operations
from baleen.server.anthropic_messages import count_tokens, messages
from baleen.server.chat_completions import chat_completions
from baleen.server.completions import completions
from baleen.server.engine_client import EngineClient
from baleen.server.fields import read_sampling_defaults
from baleen.server.generation import Service
from baleen.server.metrics import Metrics
from baleen.server.native import generate
from baleen.server.openapi import document
from baleen.server.response_store import ResponseStore
from baleen.server.responses import cancel_response, create_response, delete_response, get_response
from baleen.server.shared_counters import SharedCounters
from baleen.server.stream import json_response
from baleen.server.tokenize import detokenize, tokenize


def create_app(
    config: Config, client: EngineClient, tokenizer: Tokenizer, counters: SharedCounters | None = None
) -> FastAPI:
    """The application that serves `config`'s model; the caller starts and ends `client`. Raises ConfigError.

    counters   shared with the other API processes, if there are any
    """
    app = FastAPI(title="baleen", docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    for path, handler, methods in ROUTES:
        app.add_route(path, handler, methods=methods)
    endpoints = [(path, method) for path, _, methods in ROUTES for method in methods]
    served = Metrics(client, config, counters or SharedCounters(), endpoints)
    app.state.service = Service(config, client, tokenizer, read_sampling_defaults(config.model_path), served)
    app.state.responses = ResponseStore(enabled=config.server.tokenizer_worker_num == 1)
    middleware.install(app, config.server, served)
    return app


async def describe(request: Request) -> Response:
    """All routes, in OpenAPI's format."""
    config: Config = request.app.state.service.config
    return json_response(document(needs_key=config.server.api_key is not None))


ROUTES: list[tuple[str, Callable[[Request], Awaitable[Response]], list[str]]] = [
    ("/", operations.index, ["GET"]),
    ("/openapi.json", describe, ["GET"]),
    ("/v1/chat/completions", chat_completions, ["POST"]),
    ("/v1/completions", completions, ["POST"]),
    ("/v1/responses", create_response, ["POST"]),
    ("/v1/responses/{response_id}", get_response, ["GET"]),
    ("/v1/responses/{response_id}", delete_response, ["DELETE"]),
    ("/v1/responses/{response_id}/cancel", cancel_response, ["POST"]),
    ("/v1/messages", messages, ["POST"]),
    ("/v1/messages/count_tokens", count_tokens, ["POST"]),
    ("/v1/models", operations.models, ["GET"]),
    ("/v1/models/{name:path}", operations.model, ["GET"]),
    ("/generate", generate, ["POST", "PUT"]),
    ("/tokenize", tokenize, ["POST"]),
    ("/v1/tokenize", tokenize, ["POST"]),
    ("/detokenize", detokenize, ["POST"]),
    ("/v1/detokenize", detokenize, ["POST"]),
    ("/abort_request", operations.abort_request, ["POST"]),
    ("/health", operations.health, ["GET"]),
    ("/health_generate", operations.health_generate, ["GET"]),
    ("/ping", operations.health, ["GET"]),
    ("/metrics", operations.show_metrics, ["GET"]),
    ("/get_load", operations.load, ["GET"]),
    ("/server_info", operations.server_info, ["GET"]),
    ("/get_server_info", operations.server_info, ["GET"]),
    ("/model_info", operations.model_info, ["GET"]),
    ("/get_model_info", operations.model_info, ["GET"]),
    ("/flush_cache", operations.flush_cache, ["GET", "POST"]),
]
