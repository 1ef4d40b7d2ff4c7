"""Every object that crosses a process or folder boundary, as frozen msgspec structs of plain data.

API process -> engine: `Hello`, `GenerateRequest`, `AbortRequest`, `FlushCache`, `Shutdown`.
engine -> API process: `EngineReady`, `TokenOutputs`, `EngineStats`, `CacheFlushed`.
scheduler -> runner: `ScheduledBatch`; runner -> scheduler: `StepOutput`. Both hold ints only, so that a batch can be
sent to the other ranks of a replica as it is.
"""

from __future__ import annotations

from array import array
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the output's text must match. The engine compiles it; one that does not compile ends its request with an
    error of status 400 before any token.

    kind           json_schema: `text` is a JSON schema. regex. ebnf. structural_tag: `text` is xgrammar's JSON.
                   tools: `text` is JSON {"format": "deepseekv32" | "deepseekv31", "tools": [...], "tool_choice":
                   "auto" | "required" | {"type": "function", "function": {"name"}}, "parallel_tool_calls": bool}; with
                   "auto" also "answer_schema": the text is calls, or JSON of this schema
    starts_after   the output is free up to and including the first token with this id (that of `</think>`);
                   None: the first token of the output must match already
    """

    kind: Literal["json_schema", "regex", "ebnf", "structural_tag", "tools"]
    text: str
    starts_after: int | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen. Every field is final: the server has already applied defaults.

    min_new_tokens      before so many tokens neither eos nor a stop id is chosen unless the grammar allows nothing else
    temperature         0 is greedy
    top_k               -1 keeps all
    logit_bias          (token id, added to its logit after the penalties, before temperature); each id once
    logprobs            None: none. n >= 0: logprob of the chosen token and of the n likeliest, as the model gave them:
                        before penalties, bias, temperature and filters
    prompt_logprobs     None: none. Else the logprobs of the prompt's tokens from this position on, each with as many
                        of the likeliest as `logprobs` says (None: 0)
    seed                None: drawn by the server, so that a request's tokens never depend on its neighbours
    stop                strings; matched on text by the detokenizer, carried here for `baleen.LLM`
    stop_token_ids      besides the model's eos ids; `ignore_eos` turns both off
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """True if sampling depends on the tokens seen so far."""
        return self.has_penalties or self.grammar is not None

    @property
    def has_penalties(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0


def pack_ids(ids: list[int]) -> bytes:
    """Token ids as int32 bytes: msgpack of a list of 131,072 ints takes 26 ms, of these bytes nothing."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


# ---- API process -> engine
# ---------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """An API process listens from now on: answered by `EngineReady` once the model is loaded. Requests of an earlier
    process in its place are aborted.
    """


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One sequence to continue. `input_ids` is `pack_ids` of at least one token; the server has checked the length.

    Answered by outputs to the process that sent it, exactly one with a finish_reason, the last. A `rid` that another
    open request has is an error of status 400.

    priority   with --enable-priority-scheduling: larger goes first (smaller, if the flags say so); 0 where nobody gave
               one. Without the flag it is not looked at
    """

    rid: str
    input_ids: bytes
    sampling: SamplingParams
    priority: int = 0


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    """Stop `rid` and free its pages at once; unknown ids are ignored. Its last output follows, with finish_reason
    "abort" and status 200.

    prefix   stop every request whose rid starts with `rid`, of whichever API process
    """

    rid: str
    prefix: bool = False


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Empty the prefix cache; answered by `CacheFlushed`. Refused while requests run."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process after the step that runs."""


EngineInput = Hello | GenerateRequest | AbortRequest | FlushCache | Shutdown


# ---- engine -> API process
# ---------------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of one sampled token; `top` is (token id, logprob), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step added to one request. Totals count the tokens up to and including this output.

    token_ids      new ids; includes the stopping eos
    matched        the eos or stop id that ended the request
    message        with finish_reason "error": what went wrong, for the user
    status         with finish_reason "error" or "abort": the HTTP status that says whose fault it was
    prompt_logprobs  with the first output only, if asked for: one for each prompt token from `sampling.prompt_logprobs`
                   on; None for the very first token, which nothing predicts
    """

    rid: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched: int | None = None
    message: str = ""
    status: int = 500
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class TokenOutputs(msgspec.Struct, frozen=True, tag=True):
    """All outputs of one engine step, in one message."""

    outputs: tuple[TokenOutput, ...]


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Hello`: the model is loaded. `num_pages` is the size of the KV pool without the padding page."""

    num_pages: int
    page_size: int
    load_seconds: float


# Upper bounds of the queue time histogram.
QUEUE_SECONDS = (0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 10, 15, 20, 30, 60, 120, 300, 600, 1200, 3000)


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Counters for /metrics and /server_info; gauges are of now, `*_total` since start.

    num_waiting_tokens     prompt tokens, and output of retracted requests, in the queue
    num_retracted          waiting requests that ran before; part of num_waiting
    num_decoding_tokens    lengths of the requests that are past their prompt, summed
    num_cached_pages       pages of the prefix cache, of which num_evictable_pages are in no running request's use
    num_aborted_total      ended by AbortRequest
    num_timeouts_total     ended by --request-waiting-timeout or --request-running-timeout
    queue_seconds_total    time from arrival to first admission, of all requests admitted
    queue_counts_total     how many of these waited at most QUEUE_SECONDS[i], and more than the bound before; one entry
                           more than there are bounds
    forward_seconds_total  time inside the model's forward; the rest of a busy engine's time is overhead
    num_grammar_queue      requests whose grammar is being compiled; not part of num_waiting
    num_grammar_compiled_total  and num_grammar_failed_total: grammars; each counts once
    grammar_compile_seconds_total  time of the compiling threads
    grammar_mask_seconds_total  time of the thread that works out masks, beside the forward
    grammar_wait_seconds_total  what the forward did not hide of it
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_retracted: int = 0
    num_decoding_tokens: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_cached_pages: int = 0
    num_evictable_pages: int = 0
    num_evicted_pages_total: int = 0
    num_steps_total: int = 0
    num_prompt_tokens_total: int = 0
    num_cached_tokens_total: int = 0
    num_generated_tokens_total: int = 0
    num_retractions_total: int = 0
    num_aborted_total: int = 0
    num_timeouts_total: int = 0
    queue_seconds_total: float = 0.0
    queue_counts_total: tuple[int, ...] = (0,) * (len(QUEUE_SECONDS) + 1)
    forward_seconds_total: float = 0.0
    num_grammar_queue: int = 0
    num_grammar_compiled_total: int = 0
    num_grammar_failed_total: int = 0
    grammar_compile_seconds_total: float = 0.0
    grammar_mask_seconds_total: float = 0.0
    grammar_wait_seconds_total: float = 0.0


class CacheFlushed(msgspec.Struct, frozen=True, tag=True):
    """Answer to `FlushCache`. `message` says why not when `ok` is false."""

    ok: bool
    message: str = ""


EngineOutput = EngineReady | TokenOutputs | EngineStats | CacheFlushed


# ---- scheduler <-> runner
# ----------------------------------------------------------------------------------------------


class OpenSlot(msgspec.Struct, frozen=True, kw_only=True):
    """A request enters a runner slot (first time, or again after a retraction): forget what the slot held.

    pages        page ids of the cached prefix, in order; `ScheduledRow.new_pages` continue them
    num_prompt   prompt length in tokens; later ids are output (the penalties tell them apart)
    history      all ids known so far, if `sampling.needs_history`, else empty
    """

    sampling: SamplingParams
    pages: tuple[int, ...]
    num_prompt: int
    history: tuple[int, ...] = ()


class ScoredTokens(msgspec.Struct, frozen=True):
    """Prompt tokens whose logprobs are wanted: `token_ids[i]` under the logits of position `start + i`, all of the same
    row. Its own position is one further, so the last may not be among the row's tokens.
    """

    start: int
    token_ids: tuple[int, ...]


class ScheduledRow(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one request in one step.

    slot         the request's index in the runner's state, 0 <= slot < max_running_requests
    start        position of the first token computed
    token_ids    the tokens computed; empty: one token, the last one sampled in this slot (it may still be on the
                 device)
    new_pages    page ids appended to the slot's page table before the step, so that every position computed has a page
    sample       sample from the last token's logits
    scored       prompt tokens whose logprobs this row gives, if any are wanted
    """

    slot: int
    start: int
    token_ids: tuple[int, ...] = ()
    new_pages: tuple[int, ...] = ()
    sample: bool = True
    open: OpenSlot | None = None
    scored: ScoredTokens | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or 1


class ScheduledBatch(msgspec.Struct, frozen=True):
    """One forward: decode rows (no `token_ids`) first, then prefill chunks. Never empty."""

    step: int
    rows: tuple[ScheduledRow, ...]

    @property
    def only_decodes(self) -> bool:
        """True if all rows are decode rows."""
        return not self.rows[-1].token_ids


class RowError(msgspec.Struct, frozen=True):
    """Why a row's request ends with an error. `row` is an index into `StepOutput.token_ids`, the rest as in
    `TokenOutput`.
    """

    row: int
    status: int
    message: str


class StepOutput(msgspec.Struct, frozen=True):
    """`token_ids` and `logprobs` have one entry for each row with `sample`, in row order; a row that asked for no
    logprobs has None. `prompt_logprobs` has one entry for each row with `scored`, one logprob for each of its tokens.

    A token id of -1, and a prompt logprob that is NaN, says that the row's logits held NaN or infinity; the request
    ends with an error, the others go on. So does that of a row in `errors`, whatever its token.
    """

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    errors: tuple[RowError, ...] = ()
