"""One HTTP request's sequences: sent to the engine, turned to text, stopped at stop strings, counted, aborted."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baleen.chat.detokenizer import Detokenizer
from baleen.chat.tokenizer import Tokenizer
from baleen.config import Config
from baleen.messages import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput, pack_ids
from baleen.server.engine_client import EngineClient, OutputChannel
from baleen.server.errors import ApiError, bad_request
from baleen.server.metrics import Metrics

THREAD_CHARS = 4096  # longer texts are tokenized in a thread, so that other requests' streams go on


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine output adds to choice `index`.

    text       may be empty: an incomplete character, or a possible stop string, is withheld
    logprobs   one per token if asked for, else empty
    offsets    with `logprobs`: where each token's text begins, in characters of the whole text
    matched    with finish_reason "stop": the stop string, or the id of the stop token
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched: int | str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to generate: what the engine needs, and what the detokenizer does."""

    input_ids: list[int]
    sampling: SamplingParams
    skip_special_tokens: bool = True


class Choice:
    """The state of one sequence on its way to the client. Counts are in tokens."""

    def __init__(self, index: int, spec: SequenceSpec, tokenizer: Tokenizer) -> None:
        self.index = index
        self.rid = uuid.uuid4().hex
        self.num_prompt_tokens = len(spec.input_ids)
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.finished = False
        self.last_time = 0.0
        self._wants_logprobs = spec.sampling.logprobs is not None
        self._detokenizer = Detokenizer(tokenizer, spec.sampling.stop, skip_special_tokens=spec.skip_special_tokens)

    def advance(self, output: TokenOutput) -> Piece:
        """Take an output of the engine; the stop token that ended the sequence adds no text."""
        detokenizer = self._detokenizer
        ids = output.token_ids
        visible = ids[:-1] if output.matched is not None else ids
        read_before = detokenizer.num_tokens
        text = ""
        offsets: list[int] = []
        if self._wants_logprobs:
            for token_id in visible:
                offsets.append(detokenizer.num_chars)
                text += detokenizer.push((token_id,))
            offsets += [detokenizer.num_chars] * (len(ids) - len(visible))
        else:
            text = detokenizer.push(visible)
        if output.finish_reason is not None and detokenizer.matched is None:
            text += detokenizer.finish()
        reason: FinishReason | None = output.finish_reason
        matched: int | str | None = output.matched
        num_new = len(ids)
        if detokenizer.matched is not None:
            reason, matched = "stop", detokenizer.matched
            num_new = detokenizer.num_tokens - read_before
        self.num_cached_tokens = output.num_cached_tokens or self.num_cached_tokens
        self.num_output_tokens += num_new
        self.finished = reason is not None
        return Piece(
            self.index,
            text,
            ids[:num_new],
            output.logprobs[:num_new],
            tuple(offsets[:num_new]),
            reason,
            matched,
            output.message,
        )


class Generation:
    """All sequences of one HTTP request. Read with `next` until `finished`; `close` in any case."""

    def __init__(self, service: Service, specs: Sequence[SequenceSpec], *, arrived: float) -> None:
        self.choices = [Choice(i, spec, service.tokenizer) for i, spec in enumerate(specs)]
        self._client = service.client
        self._metrics = service.metrics
        self._arrived = arrived
        self._by_rid = {choice.rid: choice for choice in self.choices}
        self._channel = OutputChannel()
        self._failure: ApiError | None = None  # raised once the pieces before it are read
        requests = [
            GenerateRequest(rid=choice.rid, input_ids=pack_ids(spec.input_ids), sampling=spec.sampling)
            for choice, spec in zip(self.choices, specs)
        ]
        self._client.submit(requests, self._channel)

    @property
    def finished(self) -> bool:
        return self._failure is None and all(choice.finished for choice in self.choices)

    async def next(self) -> list[Piece]:
        """What has arrived, at least one piece. Raises ApiError where the engine failed; the rest is aborted then."""
        pieces: list[Piece] = []
        while not pieces and self._failure is None:
            for output in await self._channel.get():
                choice = self._by_rid[output.rid]
                if choice.finished:
                    continue  # it was on its way while the stop string was found
                piece = choice.advance(output)
                self._count(choice, piece)
                self._failure = _failure(choice, piece)
                if self._failure is not None:
                    self.close()
                    break
                if piece.finish_reason is not None and output.finish_reason is None:
                    self._client.abort(choice.rid)
                pieces.append(piece)
        if not pieces and self._failure is not None:
            raise self._failure
        return pieces

    def close(self) -> None:
        """Abort what has not ended."""
        for choice in self.choices:
            if not choice.finished:
                choice.finished = True
                self._client.abort(choice.rid)
                self._metrics.requests.inc()
                self._metrics.aborted_requests.inc()

    def _count(self, choice: Choice, piece: Piece) -> None:
        metrics, now, num_new = self._metrics, time.perf_counter(), len(piece.token_ids)
        if num_new:
            metrics.generation_tokens.inc(num_new)
            if choice.last_time:
                for _ in range(num_new):
                    metrics.inter_token_latency.observe((now - choice.last_time) / num_new)
            else:
                metrics.time_to_first_token.observe(now - self._arrived)
            choice.last_time = now
        if piece.finish_reason is not None:
            metrics.requests.inc()
            metrics.prompt_tokens.inc(choice.num_prompt_tokens)
            metrics.cached_tokens.inc(choice.num_cached_tokens)
            metrics.e2e_latency.observe(now - self._arrived)


def _failure(choice: Choice, piece: Piece) -> ApiError | None:
    if piece.finish_reason == "error":
        return ApiError(500, piece.message or "the engine failed", code="engine_error")
    if piece.finish_reason == "abort" and choice.num_output_tokens == 0:
        return ApiError(503, piece.message or "the engine aborted the request", code="engine_unavailable")
    return None


class Service:
    """What every handler needs: the resolved config, the engine, the tokenizer, and the rules that depend on them.

    max_tokens          tokens one sequence may have, prompt and answer: the context, or the cache if that is smaller
    sampling_defaults   of generation_config.json, for chat
    """

    def __init__(
        self, config: Config, client: EngineClient, tokenizer: Tokenizer, sampling_defaults: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.client = client
        self.tokenizer = tokenizer
        self.model_name = config.server.served_model_name
        self.metrics = Metrics(client, self.model_name)
        self.max_tokens = min(config.load.context_length, config.cache.max_total_tokens)
        self.sampling_defaults = sampling_defaults
        self.created = int(time.time())
        self._seeds = random.Random(config.load.random_seed)

    def seed(self, given: int | None, i: int) -> int:
        """Of choice i of n: given + i, so that the choices differ and repeat; else drawn by lot. 0 <= seed < 2^63."""
        return self._seeds.getrandbits(63) if given is None else (given + i) % 2**63

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if `name` is given and not the served model's; "default" is always this one."""
        if name not in (None, "default", self.model_name):
            message = f"the model {name!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, param: str) -> list[int]:
        """Ids of `text`, without holding up the event loop for a long one.

        Raises ApiError 400 for a text that cannot fit, whatever its ids: tokenizing 50 MB takes minutes.
        """
        least = len(text) // self.tokenizer.max_token_bytes
        if least >= self.max_tokens:
            message = (
                f"the prompt has more than {least} tokens; the longest request, with its answer, is {self.max_tokens}"
            )
            raise bad_request(param, message, "context_length_exceeded")
        if len(text) < THREAD_CHARS:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError 400 if the model has no such ids."""
        vocab_size = self.config.model.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise bad_request(param, f"token id {bad} is not in the vocabulary of {vocab_size}")

    def num_new_tokens(
        self, num_prompt: int, asked: int | None, default: int | None, *, prompt_param: str, max_param: str
    ) -> int:
        """How many tokens to generate: what is asked for if it fits, else `default` or what fits. Raises ApiError 400.

        default   when nothing is asked for; None: to the end of the context
        """
        if num_prompt == 0:
            raise bad_request(prompt_param, "the prompt must have at least one token")
        room = self.max_tokens - num_prompt
        code = "context_length_exceeded"
        if room < 1:
            message = f"the prompt has {num_prompt} tokens; the longest request, with its answer, is {self.max_tokens}"
            raise bad_request(prompt_param, message, code)
        if asked is not None and asked > room:
            message = (
                f"{num_prompt} prompt tokens and {asked} to generate are {num_prompt + asked}; "
                f"the longest request is {self.max_tokens} tokens: ask for at most {room}"
            )
            raise bad_request(max_param, message, code)
        return asked if asked is not None else min(room, default or room)

    def start(self, specs: Sequence[SequenceSpec], *, arrived: float) -> Generation:
        """Send all sequences of a request to the engine. Raises ApiError 503 if it cannot take them."""
        limits = self.config.scheduler
        if limits.max_queued_requests is not None:
            queued = self.client.num_open + len(specs) - limits.max_running_requests
            if max(queued, self.client.stats.num_waiting) > limits.max_queued_requests:
                message = f"the request queue is full (--max-queued-requests {limits.max_queued_requests})"
                raise ApiError(503, message, code="queue_full")
        return Generation(self, specs, arrived=arrived)
