"""POST /generate, SGLang's own route: text or ids in, text and ids out, alone or in batches. Streams are cumulative."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import cached_property
from typing import Annotated, Any, ClassVar

from fastapi import Request, Response
from pydantic import Field, field_validator

from baleen.server import protocol
from baleen.server.errors import bad_request
from baleen.server.generation import Generation, Piece, SequenceSpec, Service
from baleen.server.protocol import MAX_CHOICES, MAX_LOGPROBS, Int64, RequestModel, SamplingFields
from baleen.server.stream import (
    EventStream,
    all_pieces,
    event,
    first_pieces,
    json_response,
    pieces_until_finished,
    read_json,
)

DEFAULT_MAX_NEW_TOKENS = 128


class GenerateSampling(SamplingFields):
    """`sampling_params` of a request."""

    not_built: ClassVar = {
        "custom_params": (),
        "ebnf": (),
        "json_schema": (),
        "logit_bias": ({},),
        "min_new_tokens": (0,),
        "no_stop_trim": (False,),
        "regex": (),
        "spaces_between_special_tokens": (True,),
        "stop_regex": ([], ""),
        "stream_interval": (1,),
        "structural_tag": (),
    }
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    sampling_seed: Int64 | None = None


class GenerateBody(RequestModel):
    """One of `text` and `input_ids`; lists of them make a batch, and `sampling_params` may then be a list too."""

    not_built: ClassVar = {
        "audio_data": (),
        "bootstrap_host": (),
        "bootstrap_port": (),
        "bootstrap_room": (),
        "custom_logit_processor": (),
        "extra_key": (),
        "image_data": (),
        "input_embeds": (),
        "logprob_start_len": (-1,),
        "lora_path": (),
        "priority": (0,),
        "return_entropy": (False,),
        "return_hidden_states": (False,),
        "return_indexer_topk": (False,),
        "return_prompt_token_ids": (False,),
        "return_routed_experts": (False,),
        "return_sampling_mask": (False,),
        "routed_dp_rank": (),
        "session_id": (),
        "session_params": (),
        "token_ids_logprob": (),
        "video_data": (),
    }
    text: Any = None
    input_ids: Any = None
    sampling_params: Any = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | None = None

    @field_validator("text")
    @classmethod
    def _text_form(cls, value: Any) -> Any:
        if value is None or isinstance(value, str) or (value and _all(value, str)):
            return value
        raise ValueError("must be a string or a non-empty list of strings")

    @field_validator("input_ids")
    @classmethod
    def _ids_form(cls, value: Any) -> Any:
        if value is None or (value and (_all(value, int) or (_all(value, list) and all(_all(v, int) for v in value)))):
            return value
        raise ValueError("must be a non-empty list of token ids, or a list of such lists")

    @field_validator("sampling_params")
    @classmethod
    def _params_form(cls, value: Any) -> Any:
        if value is None or isinstance(value, dict) or _all(value, dict):
            return value
        raise ValueError("must be an object, or for a batch a list of objects")

    @property
    def is_batch(self) -> bool:
        return isinstance(self.text, list) or (self.input_ids is not None and isinstance(self.input_ids[0], list))

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.text if self.text is not None else self.input_ids
        return prompt if self.is_batch else [prompt]

    @cached_property
    def samplings(self) -> list[GenerateSampling]:
        """One per prompt. Raises ApiError 400."""
        given = self.sampling_params
        if isinstance(given, list):
            return [protocol.parse_part(GenerateSampling, p, f"sampling_params[{i}].") for i, p in enumerate(given)]
        return [protocol.parse_part(GenerateSampling, given or {}, "sampling_params.")] * len(self.prompts)

    @property
    def n(self) -> int:
        return self.samplings[0].n or 1

    def refuse_not_built(self, prefix: str = "") -> None:
        super().refuse_not_built(prefix)
        if (self.text is None) == (self.input_ids is None):
            raise bad_request("text", "exactly one of text and input_ids must be given")
        if len(self.samplings) != len(self.prompts):
            message = f"{len(self.samplings)} sets for {len(self.prompts)} prompts"
            raise bad_request("sampling_params", message)
        for i, sampling in enumerate(self.samplings):
            if (sampling.n or 1) != self.n:
                raise bad_request(f"sampling_params[{i}].n", "must be the same for all prompts of a batch")


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


async def generate(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    body = protocol.parse(GenerateBody, await read_json(request))
    generation = service.start(await _specs(service, body), arrived=arrived)
    answer = _Answer(service, body, generation, arrived)
    if body.stream:
        return EventStream(answer.events(await first_pieces(request, generation)), generation)
    return json_response(answer.complete(await all_pieces(request, generation)))


async def _specs(service: Service, body: GenerateBody) -> list[SequenceSpec]:
    """All choices of the first prompt, then of the second, ..."""
    specs = []
    for prompt, fields in zip(body.prompts, body.samplings):
        param = "text" if isinstance(prompt, str) else "input_ids"
        if isinstance(prompt, str):
            input_ids = await service.encode(prompt, param)
        else:
            service.check_ids(prompt, param)
            input_ids = prompt
        num_new = service.num_new_tokens(
            len(input_ids),
            fields.max_new_tokens,
            DEFAULT_MAX_NEW_TOKENS,
            prompt_param=param,
            max_param="sampling_params.max_new_tokens",
        )
        logprobs = (body.top_logprobs_num or 0) if body.return_logprob else None
        for i in range(body.n):
            seed = service.seed(fields.sampling_seed, i)
            sampling = fields.sampling({}, max_new_tokens=num_new, seed=seed, logprobs=logprobs)
            specs.append(SequenceSpec(input_ids, sampling, fields.skip_special_tokens is not False))
    return specs


class _Part:
    """One sequence's answer so far."""

    def __init__(self) -> None:
        self.text = ""
        self.output_ids: list[int] = []
        self.logprobs: list[list[Any]] = []
        self.top_logprobs: list[list[list[Any]]] = []
        self.finish_reason: dict[str, Any] | None = None


class _Answer:
    """The answer to one request, whole or as events that each repeat all so far."""

    def __init__(self, service: Service, body: GenerateBody, generation: Generation, arrived: float) -> None:
        self._tokenizer = service.tokenizer
        self._generation = generation
        self._body = body
        self._arrived = arrived
        self._parts = [_Part() for _ in generation.choices]
        self._is_list = body.is_batch or body.n > 1

    def complete(self, pieces: list[Piece]) -> Any:
        for piece in pieces:
            self._add(piece)
        answers = [self._json(i) for i in range(len(self._parts))]
        return answers if self._is_list else answers[0]

    async def events(self, first: list[Piece]) -> AsyncIterator[bytes]:
        async for pieces in pieces_until_finished(self._generation, first):
            for piece in pieces:
                self._add(piece)
            for index in dict.fromkeys(piece.index for piece in pieces):  # steps that queued up make one event
                item = self._json(index)
                yield event(item | {"index": index} if self._is_list else item)

    def _add(self, piece: Piece) -> None:
        part = self._parts[piece.index]
        part.text += piece.text
        part.output_ids += piece.token_ids
        for token_id, token in zip(piece.token_ids, piece.logprobs):
            part.logprobs.append(self._triple(token_id, token.logprob))
            part.top_logprobs.append([self._triple(*top) for top in token.top])
        if piece.finish_reason == "stop":
            part.finish_reason = {"type": "stop", "matched": piece.matched}
        elif piece.finish_reason == "length":
            part.finish_reason = {"type": "length", "length": len(part.output_ids)}
        elif piece.finish_reason is not None:
            part.finish_reason = {"type": piece.finish_reason, "message": piece.message}

    def _triple(self, token_id: int, logprob: float) -> list[Any]:
        text = self._tokenizer.token_text(token_id) if self._body.return_text_in_logprobs else None
        return [protocol.finite(logprob), token_id, text]

    def _json(self, index: int) -> dict[str, Any]:
        part, choice = self._parts[index], self._generation.choices[index]
        rid = self._body.rid
        if rid and self._is_list:
            rid = f"{rid}_{index}"
        meta: dict[str, Any] = {
            "id": rid or choice.rid,
            "finish_reason": part.finish_reason,
            "prompt_tokens": choice.num_prompt_tokens,
            "completion_tokens": choice.num_output_tokens,
            "cached_tokens": choice.num_cached_tokens,
            "weight_version": "default",
        }
        if self._body.return_logprob:
            meta["output_token_logprobs"] = part.logprobs
            meta["output_token_logprobs_length"] = len(part.logprobs)
            if self._body.top_logprobs_num:
                meta["output_top_logprobs"] = part.top_logprobs
        if part.finish_reason is not None:
            meta["e2e_latency"] = time.perf_counter() - self._arrived
        return {"text": part.text, "output_ids": part.output_ids, "meta_info": meta}
