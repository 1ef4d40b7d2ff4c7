"""One HTTP request's sequences: sent to the engine, turned to text, stopped at stop strings, counted, aborted."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baleen.chat.detokenizer import Detokenizer, StopRegexTimeout
from baleen.chat.format import detect
from baleen.chat.tokenizer import Tokenizer
from baleen.config import Config
from baleen.messages import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput, pack_ids
from baleen.server.engine_client import EngineClient, OutputChannel
from baleen.server.errors import ApiError, bad_request
from baleen.server.metrics import Metrics

_CODES = {400: "invalid_request", 500: "engine_error", 503: "engine_unavailable"}  # of errors the engine found
MAX_RID_CHARS = 256
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
    """One sequence to generate: what the engine needs, and what the detokenizer does.

    shown           special ids that are text even where `skip_special_tokens` hides such
    stop_regex      stop where one of these matches, as at a stop string
    no_stop_trim    the stop string or match stays in the text
    reasoning_end   the answer starts inside reasoning, which this token ends; None: there is none
    constraint      the request's field that `sampling.grammar` came from
    """

    input_ids: list[int]
    sampling: SamplingParams
    skip_special_tokens: bool = True
    shown: frozenset[int] = frozenset()
    stop_regex: tuple[str, ...] = ()
    no_stop_trim: bool = False
    reasoning_end: int | None = None
    constraint: str | None = None


class Choice:
    """The state of one sequence on its way to the client. Counts are in tokens."""

    def __init__(self, index: int, rid: str, spec: SequenceSpec, tokenizer: Tokenizer) -> None:
        self.index = index
        self.rid = rid
        self.input_ids = spec.input_ids
        self.constraint = spec.constraint
        self.num_prompt_tokens = len(spec.input_ids)
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_reasoning_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self.finished = False
        self.last_time = 0.0
        self._reasoning_end = spec.reasoning_end
        self._wants_logprobs = spec.sampling.logprobs is not None
        self._detokenizer = Detokenizer(
            tokenizer,
            spec.sampling.stop,
            skip_special_tokens=spec.skip_special_tokens,
            shown=spec.shown,
            stop_regex=spec.stop_regex,
            no_stop_trim=spec.no_stop_trim,
        )

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
        self._count_reasoning(ids[:num_new])
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
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

    def _count_reasoning(self, ids: Sequence[int]) -> None:
        """The token that ends the reasoning is the last that counts."""
        if self._reasoning_end is None:
            return
        if self._reasoning_end in ids:
            ids = ids[: ids.index(self._reasoning_end) + 1]
            self._reasoning_end = None
        self.num_reasoning_tokens += len(ids)


class Generation:
    """All sequences of one HTTP request. Read with `next` until `finished`; `close` in any case."""

    def __init__(
        self, service: Service, specs: Sequence[SequenceSpec], *, arrived: float, rids: Sequence[str], priority: int
    ) -> None:
        self.choices = [Choice(i, rid, spec, service.tokenizer) for i, (rid, spec) in enumerate(zip(rids, specs))]
        self._client = service.client
        self._metrics = service.metrics
        self._arrived = arrived
        self._by_rid = {choice.rid: choice for choice in self.choices}
        self._channel = OutputChannel()
        self._failure: ApiError | None = None  # raised once the pieces before it are read
        requests = [
            GenerateRequest(
                rid=choice.rid, input_ids=pack_ids(spec.input_ids), sampling=spec.sampling, priority=priority
            )
            for choice, spec in zip(self.choices, specs)
        ]
        self._client.submit(requests, self._channel)
        self._metrics.open_sequences.inc(len(requests))

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
                try:
                    piece = choice.advance(output)
                except StopRegexTimeout as error:
                    self._failure = bad_request("stop_regex", str(error))
                    self.close()
                    break
                self._count(choice, piece)
                self._failure = _failure(choice, output)
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
                self._metrics.open_sequences.inc(-1)
                self._metrics.requests.inc()
                self._metrics.aborted_requests.inc()

    def _count(self, choice: Choice, piece: Piece) -> None:
        metrics, now, num_new = self._metrics, time.perf_counter(), len(piece.token_ids)
        if num_new:
            metrics.generation_tokens.inc(num_new)
            if choice.last_time:
                metrics.inter_token_latency.observe((now - choice.last_time) / num_new, num_new)
            else:
                metrics.time_to_first_token.observe(now - self._arrived)
            choice.last_time = now
        if piece.finish_reason is not None:
            metrics.open_sequences.inc(-1)
            metrics.requests.inc()
            if piece.finish_reason == "abort":
                metrics.aborted_requests.inc()
            metrics.prompt_tokens.inc(choice.num_prompt_tokens)
            metrics.cached_tokens.inc(choice.num_cached_tokens)
            metrics.prompt_tokens_histogram.observe(choice.num_prompt_tokens)
            metrics.uncached_prompt_tokens_histogram.observe(choice.num_prompt_tokens - choice.num_cached_tokens)
            metrics.generation_tokens_histogram.observe(choice.num_output_tokens)
            metrics.e2e_latency.observe(now - self._arrived)


def _failure(choice: Choice, output: TokenOutput) -> ApiError | None:
    """What ends the HTTP request with an error. An abort that was asked for (status 200), or that comes in the middle
    of an answer, is an answer: what there is of it, with finish_reason "abort".
    """
    aborted = output.finish_reason == "abort" and output.status != 200 and choice.num_output_tokens == 0
    if output.finish_reason == "error" and output.status == 400:
        field, _, problem = output.message.partition(": ")
        if field == "rid":
            return bad_request(field, problem, "duplicate_request_id")
        if choice.constraint is not None:
            kind = choice.constraint.rpartition(".")[2]  # the message may begin with it
            return bad_request(choice.constraint, output.message.removeprefix(f"{kind}: "), "invalid_grammar")
    if output.finish_reason == "error" or aborted:
        return ApiError(output.status, output.message or "the engine failed", code=_CODES.get(output.status))
    return None


class Service:
    """What every handler needs: the resolved config, the engine, the tokenizer, and the rules that depend on them.

    max_tokens          tokens one sequence may have, prompt and answer: the context, or the cache if that is smaller
    sampling_defaults   of generation_config.json, for chat
    """

    def __init__(
        self,
        config: Config,
        client: EngineClient,
        tokenizer: Tokenizer,
        sampling_defaults: Mapping[str, Any],
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.client = client
        self.tokenizer = tokenizer
        self.model_name = config.server.served_model_name
        self.metrics = metrics
        self.max_tokens = min(config.load.context_length, config.cache.max_total_tokens)
        self.sampling_defaults = sampling_defaults
        self.chat_format = detect(config)
        self.created = int(time.time())
        self._seeds = random.Random(config.load.random_seed + client.process)  # else API processes repeat each other

    def seed(self, given: int | None, i: int) -> int:
        """Of choice i of n: given + i, so that the choices differ and repeat; else drawn by lot. 0 <= seed < 2^63."""
        return self._seeds.getrandbits(63) if given is None else (given + i) % 2**63

    def priority(self, given: int | None) -> int:
        """Of a request; 0 if it gives none. Raises ApiError 400 if this server knows no priorities."""
        if given and not self.config.scheduler.enable_priority_scheduling:
            raise bad_request("priority", "this server has none (--enable-priority-scheduling)")
        return given or 0

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if `name` is given and not the served model's; "default" is always this one."""
        if name not in (None, "default", self.model_name):
            message = f"the model {name!r} does not exist; this server has {self.model_name!r} (--served-model-name)"
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
        self,
        num_prompt: int,
        asked: int | None,
        default: int | None,
        *,
        least: int | None,
        prompt_param: str,
        max_param: str,
        min_param: str,
    ) -> int:
        """How many tokens to generate: what is asked for if it fits, else `default` or what fits. Raises ApiError 400.

        default   when nothing is asked for; None: to the end of the context
        least     how many there must be before the answer may end
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
        num_new = asked if asked is not None else min(room, default or room)
        if least is not None and least > num_new:
            raise bad_request(min_param, f"{least} is more than the {num_new} tokens that may be generated")
        return num_new

    def start(
        self,
        specs: Sequence[SequenceSpec],
        *,
        arrived: float,
        rid: str | Sequence[str] | None = None,
        priority: int = 0,
    ) -> Generation:
        """Send all sequences of a request to the engine.

        rid   the client's name for one sequence, the beginning "{rid}_{i}" of names for several, or a list with a name
              for each; none: drawn by lot. POST /abort_request finds them by it

        Raises ApiError 503 if the engine cannot take them, 400 if a name is in use.
        """
        rids = _rids(rid, len(specs))
        limits = self.config.scheduler
        if limits.max_queued_requests is not None:
            queued = self.metrics.open_sequences.total() + len(specs) - limits.max_running_requests
            if max(queued, self.client.stats.num_waiting) > limits.max_queued_requests:
                message = f"the request queue is full (--max-queued-requests {limits.max_queued_requests})"
                raise ApiError(503, message, code="queue_full")
        return Generation(self, specs, arrived=arrived, rids=rids, priority=priority)


def _rids(given: str | Sequence[str] | None, count: int) -> list[str]:
    """Names for the engine. Raises ApiError 400."""
    if not given:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(given, str):
        given = [given] if count == 1 else [f"{given}_{i}" for i in range(count)]
    if len(given) != count:
        raise bad_request("rid", f"{len(given)} names for {count} sequences")
    if len(set(given)) != count:
        raise bad_request("rid", "the same name twice", "duplicate_request_id")
    if any(not 1 <= len(rid) <= MAX_RID_CHARS for rid in given):
        raise bad_request("rid", f"a name has 1 to {MAX_RID_CHARS} characters")
    return list(given)
