"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import Request, Response
from msgspec import UNSET

from baleen.server import protocol
from baleen.server.generation import Generation, Piece, SequenceSpec, Service
from baleen.server.protocol import CompletionRequest
from baleen.server.stream import (
    EventStream,
    all_pieces,
    event,
    first_pieces,
    json_response,
    pieces_until_finished,
    read_json,
)

DEFAULT_MAX_TOKENS = 16


async def completions(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    body = protocol.parse(CompletionRequest, await read_json(request))
    service.check_model(body.model)
    generation = service.start(await _specs(service, body), arrived=arrived)
    answer = _Answer(service, body, generation)
    if body.stream:
        return EventStream(answer.events(await first_pieces(request, generation)), generation)
    return json_response(answer.complete(await all_pieces(request, generation)))


async def _specs(service: Service, body: CompletionRequest) -> list[SequenceSpec]:
    """All choices of the first prompt, then of the second, ..."""
    specs = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            input_ids = await service.encode(prompt, "prompt")
        else:
            service.check_ids(prompt, "prompt")
            input_ids = prompt
        num_new = service.num_new_tokens(
            len(input_ids), body.max_tokens, DEFAULT_MAX_TOKENS, prompt_param="prompt", max_param="max_tokens"
        )
        for i in range(body.n or 1):
            # The checkpoint's sampling defaults are for chat: a completion is plain sampling unless it says otherwise.
            seed = service.seed(body.seed, i)
            sampling = body.sampling({}, max_new_tokens=num_new, seed=seed, logprobs=body.logprobs)
            specs.append(SequenceSpec(input_ids, sampling, body.skip_special_tokens is not False))
    return specs


class _Answer:
    """The answer to one request, whole or as events."""

    def __init__(self, service: Service, body: CompletionRequest, generation: Generation) -> None:
        self._tokenizer = service.tokenizer
        self._generation = generation
        self._body = body
        self._id = body.rid or f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model_name
        self._usage = None if body.include_usage else UNSET
        # Tokens whose text is withheld: their logprobs go out with the next text.
        self._waiting: list[list[Piece]] = [[] for _ in generation.choices]

    def complete(self, pieces: list[Piece]) -> protocol.Completion:
        by_choice: list[list[Piece]] = [[] for _ in self._generation.choices]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        choices = [self._choice(pieces) for pieces in by_choice]
        return protocol.Completion(self._id, self._created, self._model, choices, self._total())

    async def events(self, first: list[Piece]) -> AsyncIterator[bytes]:
        """Texts, the finish_reason with a choice's last one; at the end the usage, if asked for."""
        async for pieces in pieces_until_finished(self._generation, first):
            data = b"".join(self._events(piece) for piece in pieces)
            if data:
                yield data
        if self._body.include_usage:
            yield event(protocol.Completion(self._id, self._created, self._model, [], self._total()))

    def _events(self, piece: Piece) -> bytes:
        waiting = self._waiting[piece.index]
        waiting.append(piece)
        if not piece.text and piece.finish_reason is None:
            return b""
        chunk = protocol.Completion(self._id, self._created, self._model, [self._choice(waiting)], self._usage)
        waiting.clear()
        return event(chunk)

    def _choice(self, pieces: list[Piece]) -> protocol.CompletionChoice:
        """What successive pieces of one choice say together."""
        last = pieces[-1]
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = protocol.completion_logprobs(
                self._tokenizer,
                [i for piece in pieces for i in piece.token_ids],
                [logprob for piece in pieces for logprob in piece.logprobs],
                [offset for piece in pieces for offset in piece.offsets],
            )
        text = "".join(piece.text for piece in pieces)
        return protocol.CompletionChoice(last.index, text, last.finish_reason, logprobs, last.matched)

    def _total(self) -> protocol.Usage:
        return protocol.usage(self._generation.choices, self._body.n or 1)
