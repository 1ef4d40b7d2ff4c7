"""POST /generate, SGLang's own route: text or ids in, text and ids out, alone or in batches. Streams are cumulative."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar

import msgspec
from fastapi import Request, Response
from pydantic import Field, field_validator

from baleen.messages import TokenLogprobs
from baleen.server import answers, fields
from baleen.server.constraints import ConstraintFields
from baleen.server.errors import bad_request
from baleen.server.fields import MAX_CHOICES, MAX_LOGPROBS, REFUSED, Int64, NumTokens, RequestModel
from baleen.server.generation import Choice, Generation, Piece, SequenceSpec, Service
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


class GenerateSampling(ConstraintFields):
    """`sampling_params` of a request."""

    refused: ClassVar = {"custom_params": ({},)}
    max_new_tokens: NumTokens | None = None
    min_new_tokens: NumTokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    sampling_seed: Int64 | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None


class GenerateBody(RequestModel):
    """One of `text` and `input_ids`; lists of them make a batch, and `sampling_params` and `rid` may then be lists too.

    Bookkeeping of SGLang's (`log_metrics`, `no_logs`, `custom_labels`, `routing_key`, ...) asks for nothing here.
    """

    refused: ClassVar = REFUSED | {
        "audio_data": ([],),
        "bootstrap_pair_key": (),
        "decode_tp_size": (),
        "image_data": ([],),
        "input_embeds": ([],),
        "return_bytes": (False,),
        "return_entropy": (False,),
        "return_indexer_topk": (False,),
        "return_sampling_mask": (False,),
        "token_ids_logprob": ([],),
        "video_data": ([],),
    }
    text: Any = None
    input_ids: Any = None
    sampling_params: Any = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Field(ge=-1)] | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_text_in_logprobs: bool | None = None
    return_prompt_token_ids: bool | None = None
    require_reasoning: bool | None = None
    stream: bool | None = None
    rid: Any = None
    priority: Int64 | None = None

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

    @field_validator("rid")
    @classmethod
    def _rid_form(cls, value: Any) -> Any:
        if value is None or (value and (isinstance(value, str) or (_all(value, str) and all(value)))):
            return value
        raise ValueError("must be a non-empty string, or for a batch a list of such strings")

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
            return [fields.parse_part(GenerateSampling, p, f"sampling_params[{i}].") for i, p in enumerate(given)]
        return [fields.parse_part(GenerateSampling, given or {}, "sampling_params.")] * len(self.prompts)

    @property
    def n(self) -> int:
        return self.samplings[0].n or 1

    def param(self, i: int, name: str) -> str:
        """The full name of a sampling parameter of prompt i."""
        return f"sampling_params[{i}].{name}" if isinstance(self.sampling_params, list) else f"sampling_params.{name}"

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if (self.text is None) == (self.input_ids is None):
            raise bad_request("text", "exactly one of text and input_ids must be given")
        num = len(self.prompts)
        if len(self.samplings) != num:
            raise bad_request("sampling_params", f"{len(self.samplings)} sets for {num} prompts")
        if isinstance(self.rid, list) and len(self.rid) != num:
            raise bad_request("rid", f"{len(self.rid)} for {num} prompts")
        for i, sampling in enumerate(self.samplings):
            if (sampling.n or 1) != self.n:
                raise bad_request(f"sampling_params[{i}].n", "must be the same for all prompts of a batch")


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


async def generate(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    body = fields.parse(GenerateBody, await read_json(request))
    specs: list[SequenceSpec] = []  # all choices of the first prompt, then of the second, ...
    for i, prompt in enumerate(body.prompts):
        specs += await _specs(service, body, i, prompt)
    rid = body.rid
    if isinstance(rid, list) and body.n > 1:
        rid = [f"{name}_{i}" for name in rid for i in range(body.n)]
    generation = service.start(specs, arrived=arrived, rid=rid, priority=service.priority(body.priority))
    answer = _Answer(service, body, generation, arrived)
    if body.stream:
        return EventStream(answer.events(await first_pieces(request, generation)), generation)
    return json_response(answer.complete(await all_pieces(request, generation)))


async def _specs(service: Service, body: GenerateBody, i: int, prompt: str | list[int]) -> list[SequenceSpec]:
    """All choices of prompt i."""
    params = body.samplings[i]
    param = "text" if isinstance(prompt, str) else "input_ids"
    if isinstance(prompt, str):
        input_ids = await service.encode(prompt, param)
    else:
        service.check_ids(prompt, param)
        input_ids = prompt
    service.check_ids(params.biased_ids, body.param(i, "logit_bias"))
    num_new = service.num_new_tokens(
        len(input_ids),
        params.max_new_tokens,
        DEFAULT_MAX_NEW_TOKENS,
        least=params.min_new_tokens,
        prompt_param=param,
        max_param=body.param(i, "max_new_tokens"),
        min_param=body.param(i, "min_new_tokens"),
    )
    start = body.logprob_start_len if body.return_logprob else None
    if start is not None and start > len(input_ids):
        raise bad_request("logprob_start_len", f"{start} is beyond the prompt of {len(input_ids)} tokens")
    reasoning_end = service.tokenizer.think_end_id if body.require_reasoning else None
    constraint, grammar = params.constraint()
    if grammar is not None:
        grammar = msgspec.structs.replace(grammar, starts_after=reasoning_end)
    return [
        params.sequence(
            input_ids,
            params.sampling(
                {},
                max_new_tokens=num_new,
                min_new_tokens=params.min_new_tokens,
                seed=service.seed(params.sampling_seed, j),
                logprobs=(body.top_logprobs_num or 0) if body.return_logprob else None,
                prompt_logprobs=None if start is None or start in (-1, len(input_ids)) else start,
                grammar=grammar,
            ),
            reasoning_end=reasoning_end,
            constraint=body.param(i, constraint) if constraint else None,
        )
        for j in range(body.n)
    ]


class _Part:
    """One sequence's answer so far."""

    def __init__(self) -> None:
        self.text = ""
        self.output_ids: list[int] = []
        self.logprobs: list[list[Any]] = []
        self.top_logprobs: list[list[list[Any]]] = []
        self.last: Piece | None = None
        self.num_shown = 0  # tokens in the latest event


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
        items = [self._json(i) for i in range(len(self._parts))]
        return items if self._is_list else items[0]

    async def events(self, first: list[Piece]) -> AsyncIterator[bytes]:
        async for pieces in pieces_until_finished(self._generation, first):
            for piece in pieces:
                self._add(piece)
            for index in dict.fromkeys(piece.index for piece in pieces):  # steps that queued up make one event
                if self._is_due(index):
                    item = self._json(index)
                    yield event(item | {"index": index} if self._is_list else item)

    def _is_due(self, index: int) -> bool:
        """Whether there is an event: with the first token, then each `stream_interval` tokens, and at the end."""
        part = self._parts[index]
        interval = self._body.samplings[index // self._body.n].stream_interval or 1
        num = len(part.output_ids)
        due = part.num_shown == 0 or num - part.num_shown >= interval or self._generation.choices[index].finished
        if due:
            part.num_shown = num
        return due

    def _add(self, piece: Piece) -> None:
        part = self._parts[piece.index]
        part.text += piece.text
        part.output_ids += piece.token_ids
        part.last = piece
        self._add_logprobs(piece.token_ids, piece.logprobs, part.logprobs, part.top_logprobs)

    def _add_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], chosen: list[Any], tops: list[Any]
    ) -> None:
        for token_id, token in zip(ids, logprobs):
            chosen.append(self._triple(token_id, None if token is None else token.logprob))
            tops.append(None if token is None else [self._triple(*top) for top in token.top])

    def _triple(self, token_id: int, logprob: float | None) -> list[Any]:
        text = self._tokenizer.token_text(token_id) if self._body.return_text_in_logprobs else None
        return [None if logprob is None else answers.finite(logprob), token_id, text]

    def _json(self, index: int) -> dict[str, Any]:
        part, choice = self._parts[index], self._generation.choices[index]
        assert part.last is not None
        meta = answers.meta_info(choice, choice.rid, part.last, self._arrived)
        if self._body.return_logprob:
            meta["output_token_logprobs"] = part.logprobs
            meta["output_token_logprobs_length"] = len(part.logprobs)
            meta["input_token_logprobs"], tops = self._prompt_logprobs(choice)
            if self._body.top_logprobs_num:
                meta["output_top_logprobs"] = part.top_logprobs
                meta["input_top_logprobs"] = tops
        item = {"text": part.text, "output_ids": part.output_ids, "meta_info": meta}
        return item | {"prompt_token_ids": choice.input_ids} if self._body.return_prompt_token_ids else item

    def _prompt_logprobs(self, choice: Choice) -> tuple[list[Any], list[Any]]:
        """Of the tokens from `logprob_start_len` on, and of the likeliest in their places."""
        chosen: list[Any] = []
        tops: list[Any] = []
        ids = choice.input_ids[len(choice.input_ids) - len(choice.prompt_logprobs) :]
        self._add_logprobs(ids, choice.prompt_logprobs, chosen, tops)
        return chosen, tops
