"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator

from fastapi import Request, Response
from msgspec import UNSET

from baleen.chat.encoding import encode_messages
from baleen.chat.output_parser import Delta, ThinkSplitter
from baleen.server import protocol
from baleen.server.generation import Generation, Piece, SequenceSpec, Service
from baleen.server.protocol import ChatRequest
from baleen.server.stream import (
    EventStream,
    all_pieces,
    event,
    first_pieces,
    json_response,
    pieces_until_finished,
    read_json,
)


async def chat_completions(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    chat = protocol.parse(ChatRequest, await read_json(request))
    service.check_model(chat.model)
    input_ids = await service.encode(encode_messages(chat.messages, thinking=chat.thinking), "messages")
    asked, max_param = chat.max_new_tokens
    num_new = service.num_new_tokens(len(input_ids), asked, None, prompt_param="messages", max_param=max_param)
    specs = [
        SequenceSpec(
            input_ids,
            chat.sampling(
                service.sampling_defaults,
                max_new_tokens=num_new,
                seed=service.seed(chat.seed, i),
                logprobs=chat.num_logprobs,
            ),
            chat.skip_special_tokens is not False,
        )
        for i in range(chat.n or 1)
    ]
    generation = service.start(specs, arrived=arrived)
    answer = _Answer(service, chat, generation)
    if chat.stream:
        return EventStream(answer.events(await first_pieces(request, generation)), generation)
    return json_response(answer.complete(await all_pieces(request, generation)))


class _Part:
    """One choice's answer as it grows."""

    def __init__(self, thinking: bool) -> None:
        self.reasoning_tokens = 0
        self.logprobs: list[protocol.TokenLogprob] = []
        self.finish_reason: str | None = None
        self.matched: int | str | None = None
        self.started = False
        self._splitter = ThinkSplitter(thinking=thinking)

    def add(self, piece: Piece) -> Delta:
        """The reasoning and content that `piece` makes certain."""
        if self._splitter.reasoning:
            self.reasoning_tokens += len(piece.token_ids)
        delta = self._splitter.push(piece.text)
        if piece.finish_reason is not None:
            rest = self._splitter.finish()
            delta = Delta(delta.reasoning + rest.reasoning, delta.content + rest.content)
        self.finish_reason, self.matched = piece.finish_reason, piece.matched
        return delta


class _Answer:
    """The answer to one request, whole or as events."""

    def __init__(self, service: Service, chat: ChatRequest, generation: Generation) -> None:
        self._tokenizer = service.tokenizer
        self._generation = generation
        self._chat = chat
        self._id = chat.rid or f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model_name
        self._usage = None if chat.include_usage else UNSET
        thinking = chat.thinking and chat.separate_reasoning is not False
        self._parts = [_Part(thinking) for _ in generation.choices]

    def complete(self, pieces: list[Piece]) -> protocol.ChatCompletion:
        content: list[list[Delta]] = [[] for _ in self._parts]
        for piece in pieces:
            part = self._parts[piece.index]
            content[piece.index].append(part.add(piece))
            part.logprobs += protocol.chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
        choices = [
            protocol.ChatChoice(
                index,
                protocol.ChatMessage(
                    "".join(delta.content for delta in deltas),
                    "".join(delta.reasoning for delta in deltas) if self._chat.thinking else None,
                ),
                part.finish_reason,
                protocol.ChatLogprobs(part.logprobs) if self._chat.logprobs else None,
                part.matched,
            )
            for index, (part, deltas) in enumerate(zip(self._parts, content))
        ]
        return protocol.ChatCompletion(self._id, self._created, self._model, choices, self._total())

    async def events(self, first: list[Piece]) -> AsyncIterator[bytes]:
        """Per choice: the role, then deltas, then the finish_reason. At the end the usage, if asked for."""
        async for pieces in pieces_until_finished(self._generation, first):
            data = b"".join(event(chunk) for piece in pieces for chunk in self._chunks(piece))
            if data:
                yield data
        if self._chat.include_usage:
            yield event(protocol.ChatChunk(self._id, self._created, self._model, [], self._total()))

    def _chunks(self, piece: Piece) -> Iterator[protocol.ChatChunk]:
        part = self._parts[piece.index]
        if not part.started:
            part.started = True
            yield self._chunk(piece.index, protocol.ChatDelta(role="assistant", content=""))
        delta = part.add(piece)
        if piece.logprobs:  # of tokens whose text is withheld too: they wait for the next delta
            part.logprobs += protocol.chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
        if delta.reasoning:
            yield self._chunk(piece.index, protocol.ChatDelta(reasoning_content=delta.reasoning))
        if delta.content:
            yield self._chunk(piece.index, protocol.ChatDelta(content=delta.content))
        if piece.finish_reason is not None:
            chunk = self._chunk(piece.index, protocol.ChatDelta())
            chunk.choices[0].finish_reason = piece.finish_reason
            chunk.choices[0].matched_stop = piece.matched
            yield chunk

    def _chunk(self, index: int, delta: protocol.ChatDelta) -> protocol.ChatChunk:
        """Carries the logprobs that wait, if any, unless it is the role's."""
        part = self._parts[index]
        logprobs = None
        if part.logprobs and delta.role is UNSET:
            logprobs = protocol.ChatLogprobs(part.logprobs)
            part.logprobs = []
        choice = protocol.ChatChunkChoice(index, delta, logprobs)
        return protocol.ChatChunk(self._id, self._created, self._model, [choice], self._usage)

    def _total(self) -> protocol.Usage:
        reasoning = sum(part.reasoning_tokens for part in self._parts)
        return protocol.usage(self._generation.choices, len(self._parts), reasoning)
