"""The routes. Handlers of generation have files of their own; the small ones are here."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import Any

from fastapi import FastAPI, Request, Response

import baleen
from baleen.chat.tokenizer import Tokenizer
from baleen.config import SECTIONS, Config
from baleen.messages import GenerateRequest, SamplingParams, pack_ids
from baleen.server import errors, metrics
from baleen.server.chat_completions import chat_completions
from baleen.server.completions import completions
from baleen.server.engine_client import EngineClient
from baleen.server.errors import ApiError
from baleen.server.generation import Service
from baleen.server.native import generate
from baleen.server.protocol import ModelCard, ModelList, read_sampling_defaults
from baleen.server.stream import json_response

PROBE_SECONDS = 20.0  # how long /health_generate waits for its token


def create_app(config: Config, client: EngineClient, tokenizer: Tokenizer) -> FastAPI:
    """The application that serves `config`'s model; the caller starts and ends `client`. Raises ConfigError."""
    app = FastAPI(title="baleen", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = Service(config, client, tokenizer, read_sampling_defaults(config.model_path))
    errors.install(app)
    for path, handler, methods in [
        ("/v1/chat/completions", chat_completions, ["POST"]),
        ("/v1/completions", completions, ["POST"]),
        ("/v1/models", models, ["GET"]),
        ("/v1/models/{name:path}", model, ["GET"]),
        ("/generate", generate, ["POST", "PUT"]),
        ("/health", health, ["GET"]),
        ("/health_generate", health_generate, ["GET"]),
        ("/metrics", show_metrics, ["GET"]),
        ("/server_info", server_info, ["GET"]),
        ("/get_server_info", server_info, ["GET"]),
        ("/model_info", model_info, ["GET"]),
        ("/get_model_info", model_info, ["GET"]),
        ("/flush_cache", flush_cache, ["GET", "POST"]),
    ]:
        app.add_route(path, handler, methods=methods)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def health(request: Request) -> Response:
    """200 if requests are served, at once; 503 while the model loads, while draining, and when the engine is gone."""
    problem = _service(request).client.problem()
    if problem is not None:
        raise ApiError(503, problem, code="engine_unavailable")
    return Response()


async def health_generate(request: Request) -> Response:
    """200 once the engine has made a token for this very question."""
    probe = GenerateRequest(
        rid=f"health-{uuid.uuid4().hex}",
        input_ids=pack_ids([0]),
        sampling=SamplingParams(max_new_tokens=1, temperature=0.0, seed=0, ignore_eos=True),
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            async for output in _service(request).client.generate(probe):
                if output.finish_reason in ("error", "abort"):
                    raise ApiError(503, output.message or "the engine failed", code="engine_unavailable")
    except TimeoutError:
        message = f"the engine made no token within {PROBE_SECONDS:.0f} s"
        raise ApiError(503, message, code="engine_unavailable") from None
    return Response()


async def show_metrics(request: Request) -> Response:
    return Response(_service(request).metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})


def _card(service: Service) -> ModelCard:
    return ModelCard(service.model_name, service.created, service.config.load.model_path, service.max_tokens)


async def models(request: Request) -> Response:
    return json_response(ModelList([_card(_service(request))]))


async def model(request: Request) -> Response:
    service = _service(request)
    service.check_model(request.path_params["name"])
    return json_response(_card(service))


async def model_info(request: Request) -> Response:
    service = _service(request)
    info = {
        "model_path": service.config.load.model_path,
        "tokenizer_path": service.config.load.tokenizer_path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
    }
    return json_response(info)


async def server_info(request: Request) -> Response:
    """Every setting under SGLang's name, the limits, and the engine's latest counters."""
    service = _service(request)
    settings: dict[str, Any] = {}
    for section in SECTIONS:
        values = getattr(service.config, section)
        for field in dataclasses.fields(values):
            if not field.metadata.get("secret"):
                name = f"{section}_{field.name}" if section in ("speculative", "disaggregation") else field.name
                settings[name] = getattr(values, field.name)
    stats = service.client.stats
    state = {
        **{name: getattr(stats, name) for name in stats.__struct_fields__},
        "token_usage": metrics.token_usage(stats),
        "cache_hit_rate": metrics.cache_hit_rate(stats),
    }
    info = {
        **settings,
        "status": "ready" if service.client.problem() is None else "not ready",
        "max_total_num_tokens": service.config.cache.max_total_tokens,
        "max_req_input_len": service.max_tokens - 1,
        "load_seconds": service.client.load_seconds,
        "internal_states": [state],
        "version": baleen.__version__,
    }
    return json_response(info)


async def flush_cache(request: Request) -> Response:
    """Empty the prefix cache; refused while requests run."""
    answer = await _service(request).client.flush_cache()
    if not answer.ok:
        raise ApiError(400, f"the cache was not flushed: {answer.message}", code="busy")
    return Response("Cache flushed.\n", media_type="text/plain")
