"""The engine without HTTP: `LLM(model).generate(prompts)`.

Tokenizer, scheduler, runner and detokenizer are the server's own.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec

from baleen.chat.detokenizer import Detokenizer
from baleen.chat.format import Conversation, detect
from baleen.chat.tokenizer import Tokenizer
from baleen.engine import Engine
from baleen.flags import default_config
from baleen.messages import GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput, pack_ids

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One answer. `token_ids` includes the stopping eos, `text` does not; after a stop string `text` ends before it.

    finish_reason  "stop", "length", or "abort" after --request-running-timeout
    stop           the stop string, eos id or stop id that ended it, else None
    prompt_logprobs  of the prompt's tokens from `SamplingParams.prompt_logprobs` on; None for the very first token
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


class LLM:
    """An engine in this process.

    model     checkpoint folder
    settings  any field of `baleen.config`'s sections by name: LLM(path, max_running_requests=8,
              kv_cache_dtype="bfloat16")

    Raises ConfigError for settings that cannot be, WeightError for a checkpoint that cannot be read. Not thread-safe.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.config = default_config(model, **settings)
        self.tokenizer = Tokenizer.load(self.config)
        self.chat_format = detect(self.config)
        self.engine = Engine(self.config)
        self._rids = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread; the object is of no use afterwards."""
        self.engine.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue each prompt: text, or token ids. One `SamplingParams` for all or one each; answers in the prompts'
        order.

        Raises ValueError for an empty prompt, one the context cannot hold, ids outside the vocabulary, or a grammar
        that does not compile.
        """
        return self._generate(prompts, sampling, shown=frozenset())

    def _generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        shown: frozenset[int],
    ) -> list[Completion]:
        """`shown`: special tokens that are text all the same."""
        batch = _as_batch(prompts)
        params = [sampling or SamplingParams()] * len(batch) if not isinstance(sampling, Sequence) else list(sampling)
        if len(params) != len(batch):
            raise ValueError(f"sampling: {len(params)} for {len(batch)} prompts; give one for all or one each")
        ids = [self._ids(prompt) for prompt in batch]
        for prompt_ids, one in zip(ids, params):
            self._check(one, len(prompt_ids))
        running = {}
        for prompt_ids, one in zip(ids, params):
            if one.seed is None:
                one = msgspec.structs.replace(one, seed=secrets.randbits(63))
            rid = str(next(self._rids))
            running[rid] = _Running(Completion(), Detokenizer(self.tokenizer, one.stop, shown=shown))
            self.engine.add(GenerateRequest(rid=rid, input_ids=pack_ids(prompt_ids), sampling=one))
        try:
            while self.engine.has_work:
                for output in self.engine.step():
                    if output.rid in running and running[output.rid].advance(output):
                        self.engine.abort(output.rid)
        except BaseException:  # Ctrl-C too: the next call must not meet what is left of this one
            for rid in running:
                self.engine.abort(rid)
            raise
        return [one.completion for one in running.values()]

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool = False,
    ) -> Completion:
        """Answer a conversation, in the model's chat format. The text is the model's own, with the marks of tool calls:
        `chat.output_parser` tells reasoning and calls from content.

        Raises EncodingError for a conversation that has no prompt, and what `generate` does.
        """
        prompt = self.chat_format.encode(Conversation(messages, tools, thinking))
        return self._generate(prompt.text, sampling, shown=self.tokenizer.mark_ids)[0]

    def _check(self, sampling: SamplingParams, num_prompt: int) -> None:
        vocab_size = self.config.model.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id, _ in sampling.logit_bias):
            raise ValueError(f"logit_bias: token ids must lie in 0..{vocab_size - 1}")
        if not 0 <= (sampling.prompt_logprobs or 0) <= num_prompt:
            raise ValueError(f"prompt_logprobs: {sampling.prompt_logprobs} is no position of {num_prompt} tokens")

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("prompt: empty")
        if min(ids) < 0 or max(ids) >= self.config.model.vocab_size:
            raise ValueError(f"prompt: token ids must lie in 0..{self.config.model.vocab_size - 1}")
        if len(ids) >= self.config.load.context_length:
            raise ValueError(
                f"prompt: {len(ids)} tokens leave no room in the context of {self.config.load.context_length}"
            )
        return ids


class _Running:
    """One sequence on its way."""

    def __init__(self, completion: Completion, detokenizer: Detokenizer) -> None:
        self.completion = completion
        self.detokenizer = detokenizer

    def advance(self, output: TokenOutput) -> bool:
        """Take one output; True if a stop string has just ended the sequence, which the engine cannot know."""
        done = self.completion
        if output.finish_reason == "error":
            raise ValueError(output.message)
        if done.finish_reason:
            return False
        done.prompt_logprobs.extend(output.prompt_logprobs)
        done.num_prompt_tokens, done.num_cached_tokens = output.num_prompt_tokens, output.num_cached_tokens
        before = self.detokenizer.num_tokens
        # the text of a stop token is no part of the answer
        done.text += self.detokenizer.push(output.token_ids[:-1] if output.matched is not None else output.token_ids)
        if self.detokenizer.matched is not None:
            read = self.detokenizer.num_tokens - before
            done.token_ids.extend(output.token_ids[:read])
            done.logprobs.extend(output.logprobs[:read])
            done.finish_reason, done.stop = "stop", self.detokenizer.matched
            return output.finish_reason is None
        done.token_ids.extend(output.token_ids)
        done.logprobs.extend(output.logprobs)
        if output.finish_reason is not None:
            done.text += self.detokenizer.finish()
            done.finish_reason, done.stop = output.finish_reason, output.matched
        return False


def _as_batch(prompts: Any) -> list[Prompt]:
    """One prompt, text or ids, becomes a list of one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)
