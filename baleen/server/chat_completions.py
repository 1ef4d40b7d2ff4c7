"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from baleen.chat.output_parser import Content, Reasoning, ToolArguments, ToolCall
from baleen.server import answers, fields
from baleen.server.chat_run import ChatRun, Step, start_chat
from baleen.server.generation import Service
from baleen.server.protocol import ChatRequest
from baleen.server.stream import EventStream, event, json_response, read_json


async def chat_completions(request: Request) -> Response:
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    chat = fields.parse(ChatRequest, await read_json(request))
    run = await start_chat(request, chat, arrived=arrived)
    if chat.stream:
        return EventStream(_Stream(service, run).events(await run.first(request)), run.generation)
    return json_response(_whole(service, run, await run.all(request), arrived))


def _whole(service: Service, run: ChatRun, steps: list[Step], arrived: float) -> answers.ChatCompletion:
    by_choice: list[list[Step]] = [[] for _ in run.generation.choices]
    for step in steps:
        by_choice[step.index].append(step)
    choices = [_choice(service, run, of_choice, arrived) for of_choice in by_choice]
    return answers.ChatCompletion(run.id, run.created, service.model_name, choices, run.usage())


def _choice(service: Service, run: ChatRun, steps: list[Step], arrived: float) -> answers.ChatChoice:
    """What all steps of one choice say together."""
    chat, last = run.chat, steps[-1]
    reasoning, content = [], []
    calls: list[answers.ToolCall] = []
    for part in (part for step in steps for part in step.events):
        match part:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case ToolCall(index, name):
                function = answers.FunctionCall(name)
                calls.append(answers.ToolCall(index, function, run.call_id(last.index, index), "function"))
            case ToolArguments(index, text):
                calls[index].function.arguments += text
    shown = "".join(reasoning) if run.splits_reasoning and chat.shows_reasoning else None
    message = answers.ChatMessage("".join(content), shown, shown, tool_calls=calls or None)
    logprobs = None
    if chat.logprobs:
        pieces = [(step.piece.token_ids, step.piece.logprobs) for step in steps]
        entries = [entry for piece in pieces for entry in answers.chat_logprobs(service.tokenizer, *piece)]
        logprobs = answers.ChatLogprobs(entries)
    choice = run.generation.choices[last.index]
    answer = answers.ChatChoice(last.index, message, last.finish_reason, logprobs, last.matched_stop)
    if chat.return_prompt_token_ids:
        answer.prompt_token_ids = choice.input_ids
    if chat.return_meta_info:
        answer.meta_info = answers.meta_info(choice, run.id, last.piece, arrived)
    return answer


class _Stream:
    """The answer as events."""

    def __init__(self, service: Service, run: ChatRun) -> None:
        self._service = service
        self._run = run
        num = len(run.generation.choices)
        self._started = [False] * num
        self._logprobs: list[list[answers.TokenLogprob]] = [[] for _ in range(num)]  # wait for a delta to go with
        self._reasoning = [""] * num  # held back without `stream_reasoning`

    async def events(self, first: list[Step]) -> AsyncIterator[bytes]:
        """Per choice: the role, then deltas, then the finish_reason. At the end the usage, if asked for."""
        async for steps in self._run.rest(first):
            data = b"".join(event(chunk) for step in steps for chunk in self._chunks(step))
            if data:
                yield data
        if self._run.chat.include_usage:
            yield event(self._chunk([], self._run.usage()))

    def _chunks(self, step: Step) -> Iterator[answers.ChatChunk]:
        index, chat = step.index, self._run.chat
        usage = None if chat.include_usage else UNSET
        if not self._started[index]:
            self._started[index] = True
            role = answers.ChatDelta(role="assistant", content="")
            yield self._chunk([answers.ChatChunkChoice(index, role)], usage)
        self._logprobs[index] += answers.chat_logprobs(
            self._service.tokenizer, step.piece.token_ids, step.piece.logprobs
        )
        for delta in self._deltas(step):
            choice = answers.ChatChunkChoice(index, delta, self._take_logprobs(index))
            yield self._chunk([choice], self._run.usage() if chat.continuous_usage else usage)
        if step.finish_reason is not None:
            last = answers.ChatChunkChoice(
                index, answers.ChatDelta(), self._take_logprobs(index), step.finish_reason, step.matched_stop
            )
            yield self._chunk([last], usage)

    def _deltas(self, step: Step) -> Iterator[answers.ChatDelta]:
        index, chat = step.index, self._run.chat
        for part in step.events:
            if isinstance(part, Reasoning):
                if not chat.shows_reasoning:
                    continue
                if chat.stream_reasoning is not False:
                    yield answers.ChatDelta(reasoning_content=part.text, reasoning=part.text)
                else:
                    self._reasoning[index] += part.text
                continue
            yield from self._take_reasoning(index)
            match part:
                case Content(text):
                    yield answers.ChatDelta(content=text)
                case ToolCall(call, name):
                    function = answers.FunctionCall(name)
                    begun = answers.ToolCall(call, function, self._run.call_id(index, call), "function")
                    yield answers.ChatDelta(tool_calls=[begun])
                case ToolArguments(call, text):
                    fragment = answers.ToolCall(call, answers.FunctionCall(arguments=text))
                    yield answers.ChatDelta(tool_calls=[fragment])
        if step.finish_reason is not None:
            yield from self._take_reasoning(index)

    def _take_reasoning(self, index: int) -> Iterator[answers.ChatDelta]:
        text, self._reasoning[index] = self._reasoning[index], ""
        if text:
            yield answers.ChatDelta(reasoning_content=text, reasoning=text)

    def _take_logprobs(self, index: int) -> answers.ChatLogprobs | None:
        entries, self._logprobs[index] = self._logprobs[index], []
        return answers.ChatLogprobs(entries) if entries else None

    def _chunk(
        self, choices: list[answers.ChatChunkChoice], usage: answers.Usage | UnsetType | None
    ) -> answers.ChatChunk:
        return answers.ChatChunk(self._run.id, self._run.created, self._service.model_name, choices, usage)
