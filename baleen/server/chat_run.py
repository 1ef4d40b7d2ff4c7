"""One chat request on its way: what /v1/chat/completions, /v1/responses and /v1/messages share.

A ChatRequest becomes prompt ids, a grammar and one sequence for each choice; what the engine says comes back as Steps
of reasoning, content and tool calls.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import msgspec
from fastapi import Request

from baleen.chat.output_parser import Event, OutputParser
from baleen.messages import Grammar, SamplingParams
from baleen.server import answers
from baleen.server.errors import bad_request
from baleen.server.generation import Generation, Piece, Service
from baleen.server.prompt import encode_chat
from baleen.server.protocol import ChatRequest
from baleen.server.stream import first_pieces, until_disconnect


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine output adds to choice `index`.

    finish_reason   stop | length | tool_calls | abort, with the choice's last step
    """

    index: int
    events: list[Event]
    piece: Piece
    finish_reason: str | None

    @property
    def matched_stop(self) -> int | str | None:
        """The stop string or id that ended the text; of calls nobody wants to know."""
        return None if self.finish_reason == "tool_calls" else self.piece.matched


async def start_chat(request: Request, chat: ChatRequest, *, arrived: float) -> ChatRun:
    """Check, encode, submit. Raises ApiError.

    arrived   time.perf_counter() when the HTTP request came
    """
    service: Service = request.app.state.service
    chat.check()
    service.check_model(chat.model)
    tools = chat.tool_use
    prompt = await encode_chat(service, chat)
    tool_parser = service.chat_format.tool_parser
    if tools.callable and tool_parser is None:
        message = "this server reads no tool calls in the model's output (see --tool-call-parser)"
        raise bad_request("tools", message, "unsupported_parameter")
    reasoning_end = service.tokenizer.think_end_id if prompt.in_reasoning else None
    constraint, grammar = chat.constraint()
    if tools.enforced or (tools.callable and grammar is not None):
        assert tool_parser is not None
        constraint, grammar = "tools", tools.grammar(tool_parser, grammar)
    if grammar is not None:
        grammar = msgspec.structs.replace(grammar, starts_after=reasoning_end)
    sampling = _sampling(service, chat, len(prompt.input_ids), grammar)
    spec = chat.sequence(
        prompt.input_ids,
        sampling,
        shown=service.tokenizer.mark_ids,
        reasoning_end=reasoning_end,
        constraint=constraint,
    )
    specs = [
        replace(spec, sampling=msgspec.structs.replace(sampling, seed=service.seed(chat.seed, i)))
        for i in range(chat.choices_per_prompt)
    ]
    splits = service.chat_format.splits_reasoning and chat.separate_reasoning is not False
    parsers = [
        OutputParser(
            tool_parser=tool_parser if tools.callable else None,
            in_reasoning=prompt.in_reasoning and splits,
            functions=tools.names,
        )
        for _ in specs
    ]
    name = chat.rid or f"chatcmpl-{uuid.uuid4().hex}"
    generation = service.start(specs, arrived=arrived, rid=name, priority=service.priority(chat.priority))
    return ChatRun(name, generation, chat, parsers)


def _sampling(service: Service, chat: ChatRequest, num_prompt: int, grammar: Grammar | None) -> SamplingParams:
    """Of all choices, still without a seed. Raises ApiError."""
    asked, max_param = chat.max_new_tokens
    num_new = service.num_new_tokens(
        num_prompt,
        asked,
        None,
        least=chat.min_tokens,
        prompt_param="messages" if chat.input_ids is None else "input_ids",
        max_param=max_param,
        min_param="min_tokens",
    )
    service.check_ids(chat.biased_ids, "logit_bias")
    tools = chat.tool_use
    return chat.sampling(
        service.sampling_defaults,
        max_new_tokens=num_new,
        min_new_tokens=chat.min_tokens,
        seed=None,
        logprobs=chat.num_logprobs,
        grammar=grammar,
        banned_ids=service.tokenizer.mark_ids if tools.shown and not tools.callable else frozenset(),
    )


class ChatRun:
    """The answer to `chat` as it comes. Read `all`, or `first` and then `rest`.

    id                 of the answer, and its name for /abort_request; the client's `rid` if it gave one
    splits_reasoning   reasoning is events of its own: the prompt asked for it and nobody wants it in the content
    """

    def __init__(self, name: str, generation: Generation, chat: ChatRequest, parsers: list[OutputParser]) -> None:
        self.generation = generation
        self.chat = chat
        self.id = name
        self.splits_reasoning = parsers[0].in_reasoning
        self.created = int(time.time())
        self._parsers = parsers

    async def first(self, request: Request) -> list[Step]:
        """The engine's first word; raises what it says if that is an error, or ClientGone."""
        return self._steps(await first_pieces(request, self.generation))

    async def rest(self, first: list[Step]) -> AsyncIterator[list[Step]]:
        """`first`, and all that follows as it comes. Raises ApiError where the engine failed."""
        yield first
        while not self.generation.finished:
            yield self._steps(await self.generation.next())

    async def all(self, request: Request) -> list[Step]:
        """Everything, when it is complete. Raises ApiError or ClientGone; the sequences are aborted then."""

        async def collect() -> list[Step]:
            steps = []
            while not self.generation.finished:
                steps += self._steps(await self.generation.next())
            return steps

        try:
            return await until_disconnect(request, collect())
        finally:
            self.generation.close()

    def usage(self) -> answers.Usage:
        """Of what has been read so far."""
        return answers.usage(self.generation.choices, len(self.generation.choices))

    def in_reasoning(self, choice: int) -> bool:
        """Whether the text of a choice, as far as it is read, has not ended its reasoning."""
        return self._parsers[choice].in_reasoning

    def call_id(self, choice: int, call: int) -> str:
        """The same whenever asked, and no other call's: "call_" and 24 hex digits."""
        name = f"{self.generation.choices[choice].rid}/{call}"
        return "call_" + hashlib.sha256(name.encode()).hexdigest()[:24]

    def _steps(self, pieces: list[Piece]) -> list[Step]:
        return [self._step(piece) for piece in pieces]

    def _step(self, piece: Piece) -> Step:
        parser = self._parsers[piece.index]
        events = parser.push(piece.text)
        reason: str | None = piece.finish_reason
        if reason is not None:
            events += parser.finish()
            if reason == "stop" and parser.num_calls:
                reason = "tool_calls"
        return Step(piece.index, events, piece, reason)
