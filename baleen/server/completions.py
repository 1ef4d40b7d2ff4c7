"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import Request, Response
from msgspec import UNSET

from baleen.messages import TokenLogprobs
from baleen.server import answers, fields
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
    body = fields.parse(CompletionRequest, await read_json(request))
    service.check_model(body.model)
    specs = await _specs(service, body)
    name = body.rid or f"cmpl-{uuid.uuid4().hex}"
    generation = service.start(specs, arrived=arrived, rid=name, priority=service.priority(body.priority))
    answer = _Answer(name, service, body, generation, arrived)
    if body.stream:
        return EventStream(answer.events(await first_pieces(request, generation)), generation)
    return json_response(answer.complete(await all_pieces(request, generation)))


async def _specs(service: Service, body: CompletionRequest) -> list[SequenceSpec]:
    """All choices of the first prompt, then of the second, ..."""
    service.check_ids(body.biased_ids, "logit_bias")
    constraint, grammar = body.constraint()
    specs = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            input_ids = await service.encode(prompt, "prompt")
        else:
            service.check_ids(prompt, "prompt")
            input_ids = prompt
        num_new = service.num_new_tokens(
            len(input_ids),
            body.max_tokens,
            DEFAULT_MAX_TOKENS,
            least=body.min_tokens,
            prompt_param="prompt",
            max_param="max_tokens",
            min_param="min_tokens",
        )
        for i in range(body.choices_per_prompt):
            # The checkpoint's sampling defaults are for chat: a completion is plain sampling unless it says otherwise.
            sampling = body.sampling(
                {},
                max_new_tokens=num_new,
                min_new_tokens=body.min_tokens,
                seed=service.seed(body.seed, i),
                logprobs=body.logprobs,
                prompt_logprobs=0 if body.echo and body.logprobs is not None else None,
                grammar=grammar,
            )
            specs.append(body.sequence(input_ids, sampling, constraint=constraint))
    return specs


class _Answer:
    """The answer to one request, whole or as events."""

    def __init__(
        self, name: str, service: Service, body: CompletionRequest, generation: Generation, arrived: float
    ) -> None:
        self._tokenizer = service.tokenizer
        self._generation = generation
        self._body = body
        self._arrived = arrived
        self._id = name
        self._created = int(time.time())
        self._model = service.model_name
        # Tokens whose text is withheld: their logprobs go out with the next text.
        self._waiting: list[list[Piece]] = [[] for _ in generation.choices]
        # With `echo`: the prompt's text and where its tokens begin, of choices that have said it.
        self._echoes: dict[int, tuple[str, list[int]]] = {}

    def complete(self, pieces: list[Piece]) -> answers.Completion:
        by_choice: list[list[Piece]] = [[] for _ in self._generation.choices]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        choices = [self._choice(pieces) for pieces in by_choice]
        for answer, choice, said in zip(choices, self._generation.choices, by_choice):
            if self._body.return_prompt_token_ids:
                answer.prompt_token_ids = choice.input_ids
            if self._body.return_meta_info:
                answer.meta_info = answers.meta_info(choice, self._id, said[-1], self._arrived)
        return answers.Completion(self._id, self._created, self._model, choices, self._usage())

    async def events(self, first: list[Piece]) -> AsyncIterator[bytes]:
        """Texts, the finish_reason with a choice's last one; at the end the usage, if asked for."""
        async for pieces in pieces_until_finished(self._generation, first):
            data = b"".join(self._events(piece) for piece in pieces)
            if data:
                yield data
        if self._body.include_usage:
            yield event(answers.Completion(self._id, self._created, self._model, [], self._usage()))

    def _events(self, piece: Piece) -> bytes:
        waiting = self._waiting[piece.index]
        waiting.append(piece)
        if not piece.text and piece.finish_reason is None:
            return b""
        usage = self._usage() if self._body.continuous_usage else None if self._body.include_usage else UNSET
        chunk = answers.Completion(self._id, self._created, self._model, [self._choice(waiting)], usage)
        waiting.clear()
        return event(chunk)

    def _choice(self, pieces: list[Piece]) -> answers.CompletionChoice:
        """What successive pieces of one choice say together; with `echo`, the prompt before the first of them."""
        last = pieces[-1]
        text = "".join(piece.text for piece in pieces)
        ids = [i for piece in pieces for i in piece.token_ids]
        logprobs: list[TokenLogprobs | None] = [logprob for piece in pieces for logprob in piece.logprobs]
        offsets = [offset for piece in pieces for offset in piece.offsets]
        if self._body.echo:
            choice = self._generation.choices[last.index]
            said_before = last.index in self._echoes
            if not said_before:
                self._echoes[last.index] = answers.prompt_text(self._tokenizer, choice.input_ids)
            prompt, prompt_offsets = self._echoes[last.index]
            offsets = [offset + len(prompt) for offset in offsets]
            if not said_before:
                text, ids = prompt + text, choice.input_ids + ids
                logprobs, offsets = [*choice.prompt_logprobs, *logprobs], prompt_offsets + offsets
        found = None
        if self._body.logprobs is not None:
            found = answers.completion_logprobs(self._tokenizer, ids, logprobs, offsets)
        return answers.CompletionChoice(last.index, text, last.finish_reason, found, last.matched)

    def _usage(self) -> answers.Usage:
        return answers.usage(self._generation.choices, self._body.choices_per_prompt)
