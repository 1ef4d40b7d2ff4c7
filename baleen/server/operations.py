"""Health, information, and what those who run the server ask for: routes that generate nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from typing import Annotated, Any

import msgspec
from fastapi import Request, Response

import baleen
from baleen.config import PAGE_SIZE, SECTIONS
from baleen.messages import CacheFlushed, GenerateRequest, SamplingParams, pack_ids
from baleen.server import fields, metrics
from baleen.server.answers import ModelCard, ModelList
from baleen.server.errors import ApiError, bad_request
from baleen.server.generation import Service
from baleen.server.stream import json_response, read_json, until_disconnect

FLUSH_SECONDS = 0.05  # between tries of /flush_cache?timeout=
PROBE_SECONDS = 20.0  # how long /health_generate waits for its token


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
                asked = output.finish_reason == "abort" and output.status == 200  # by /abort_request: it lives
                if output.finish_reason in ("error", "abort") and not asked:
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


async def load(request: Request) -> Response:
    """How busy the engine is, for load balancers."""
    stats = _service(request).client.stats
    waiting = stats.num_waiting
    load = {
        "dp_rank": 0,
        "num_reqs": stats.num_running + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": metrics.num_used_pages(stats) * PAGE_SIZE + stats.num_waiting_tokens,
        "num_pending_tokens": stats.num_waiting_tokens,
        "ts_tic": time.time(),
    }
    return json_response([load])


async def flush_cache(request: Request) -> Response:
    """Empty the prefix cache; refused while requests run, after `timeout` seconds of waiting that they end."""
    try:
        timeout = msgspec.json.decode(request.query_params.get("timeout", "0"), type=_Seconds)
    except ValueError:
        raise bad_request("timeout", "must be seconds, 0 or more") from None
    await request.body()
    answer = await until_disconnect(request, _flush(_service(request), timeout))
    if not answer.ok:
        raise ApiError(400, f"the cache was not flushed: {answer.message}", code="busy")
    return Response("Cache flushed.\n", media_type="text/plain")


_Seconds = Annotated[float, msgspec.Meta(ge=0)]


async def _flush(service: Service, timeout: float) -> CacheFlushed:
    deadline = time.monotonic() + timeout
    while True:
        answer = await service.client.flush_cache()
        if answer.ok or time.monotonic() >= deadline:
            return answer
        await asyncio.sleep(FLUSH_SECONDS)


class AbortBody(fields.RequestModel):
    """POST /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if not self.rid and not self.abort_all:
            raise bad_request("rid", "must name a request, or the beginning of several; or send abort_all: true")


async def abort_request(request: Request) -> Response:
    """End all requests whose rid starts with `rid`, or all there are. They are answered with what they have so far."""
    body = fields.parse(AbortBody, await read_json(request))
    _service(request).client.abort_matching("" if body.abort_all else body.rid or "")
    return Response()


async def index(request: Request) -> Response:
    return Response(f"baleen {baleen.__version__} serves {_service(request).model_name}\n", media_type="text/plain")
