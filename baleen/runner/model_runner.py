"""The model on one rank, with everything that lives as long as it: KV pool, backend, sampler, request slots."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from baleen.attention.backend import make_backend
from baleen.config import FASTEST, AttentionConfig, Config
from baleen.kernels import dispatch
from baleen.messages import OpenSlot, RowError, ScheduledBatch, StepOutput, TokenLogprobs
from baleen.model.deepseek_v32 import DeepseekV32ForCausalLM
from baleen.model.layers import Precision
from baleen.model.weights import fill_randomly, load_weights
from baleen.runner.decode_graphs import DecodeGraphs, largest_batch
from baleen.runner.inputs import RequestSlots, upload
from baleen.runner.outputs import ForwardClock, SampledIds
from baleen.sampling.grammar import GrammarMasks
from baleen.sampling.grammar_compiler import GrammarCompiler
from baleen.sampling.sampler import Sampler


class LaunchedStep:
    """A step that was started. Who wants what it samples waits here, on any thread; the next may be started before."""

    def __init__(
        self,
        step: int,
        ids: SampledIds,
        logprobs: tuple[TokenLogprobs | None, ...],
        prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...],
        errors: tuple[RowError, ...],
    ) -> None:
        self._ids = ids
        self._rest = step, logprobs, prompt_logprobs, errors

    def wait(self) -> StepOutput:
        """What the step gave, once it has ended."""
        step, logprobs, prompt_logprobs, errors = self._rest
        return StepOutput(step, self._ids.read(), logprobs, prompt_logprobs, errors)


def use_kernels(attention: AttentionConfig, **pinned: str) -> None:
    """This process runs the kernels of these settings from now on. pinned: op -> implementation, besides theirs."""
    named = {"topk": attention.topk_backend, "fp8_experts": attention.moe_runner_backend}
    named = {op: name for op, name in named.items() if name != FASTEST}
    dispatch.use("auto" if attention.kernels == FASTEST else "reference", named | pinned)


def empty_model(config: Config, device: torch.device) -> DeepseekV32ForCausalLM:
    """The model of `config`, its parameters on `device` and not filled."""
    precision = Precision(getattr(torch, config.load.dtype), keep_fp8=config.load.device == "cuda")
    with device:
        return DeepseekV32ForCausalLM(config.model, precision, config.load.context_length)


class ModelRunner:
    """Loads the model of `config`; `execute` runs one step. One thread calls it at a time, steps in the order
    scheduled.

    compiler  has compiled the grammar of every request that comes; None if none has one
    forwards  time of the model's forwards since start, a warm-up's not, for benchmarks and /metrics
    """

    def __init__(self, config: Config, compiler: GrammarCompiler | None = None, *, progress: bool = False) -> None:
        attention = config.attention
        use_kernels(attention)
        self.device = torch.device(config.load.device)
        self.num_pages = config.cache.max_total_tokens // config.cache.page_size
        self.forwards = ForwardClock(self.device)
        started = time.monotonic()
        self.model = empty_model(config, self.device)
        if config.load.load_format == "dummy":
            report = fill_randomly(self.model, config.load.random_seed)
        else:
            report = load_weights(self.model, Path(config.model_path), progress=progress)
        if not report.optional_loaded:
            self.model.drop_mtp()
        self.load_seconds = time.monotonic() - started
        self.backend = make_backend(
            config.model,
            num_pages=self.num_pages,
            kv_cache_dtype=config.cache.kv_cache_dtype,
            index_cache_dtype=config.cache.index_cache_dtype,
            prefill=attention.prefill_backend,
            decode=attention.decode_backend,
            dense_prefill_threshold=attention.dense_prefill_threshold,
            device=self.device,
        )
        max_running = config.scheduler.max_running_requests
        self.slots = RequestSlots(max_running, config.load.context_length, self.device)
        self.sampler = Sampler(max_running, config.model.vocab_size, self.device, config.model.eos_token_ids)
        self.grammars = GrammarMasks(max_running, config.model.vocab_size, self.device)
        self._compiler = compiler
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda" and not config.scheduler.disable_cuda_graph:
            self.graphs = DecodeGraphs(
                self.model,
                self.backend,
                self.slots,
                max_batch=largest_batch(config.scheduler),
                context_length=config.load.context_length,
            )

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start one step and sample the rows that ask for it. Raises nothing for bad logits: such a row samples -1."""
        for row in [row for row in batch.rows if row.new_pages or row.open is not None]:
            self.slots.update(row)
            if row.open is not None:
                self._open(row.slot, row.open)
        self.forwards.start()
        logits, likeliest, prompt_logprobs = self._forward(batch)
        self.forwards.stop()
        if logits is None:
            return LaunchedStep(batch.step, SampledIds.none(self.device), (), prompt_logprobs, ())
        sampled = [row for row in batch.rows if row.sample]
        slots = [row.slot for row in sampled]
        positions = [row.start + row.num_tokens for row in sampled]
        if (
            likeliest is not None
            and self.sampler.takes_likeliest(slots, positions)
            and not self.grammars.has_any(slots)
        ):
            return LaunchedStep(batch.step, likeliest, (), prompt_logprobs, ())
        masked, errors = self.grammars.mask(logits, slots)
        tokens = self.sampler.sample(masked, slots, positions, logits)
        self.slots.remember(upload(slots, self.device), tokens.ids)
        ids = SampledIds.copied(tokens.ids)
        self.grammars.advance(slots, ids.read)
        return LaunchedStep(batch.step, ids, tuple(tokens.logprobs or ()), prompt_logprobs, errors)

    def _forward(
        self, batch: ScheduledBatch
    ) -> tuple[Tensor | None, SampledIds | None, tuple[tuple[TokenLogprobs, ...], ...]]:
        """Logits [R, vocab] of the rows that sample, None without any; their likeliest ids if they are known and
        remembered; and prompt logprobs of the rows that want them.
        """
        rows = batch.rows
        if self.graphs is not None and self.graphs.fits(len(rows)) and batch.only_decodes:
            return *self.graphs.run([row.slot for row in rows], [row.start for row in rows]), ()
        inputs = self.slots.forward_batch(batch)
        metadata = self.backend.plan(inputs)
        hidden = self.model(inputs.ids, inputs.positions, self.backend, metadata)
        last, prompt_logprobs = [], []
        token = -1
        for row in rows:
            if row.scored is not None:
                first = token + 1 + row.scored.start - row.start
                states = hidden[first : first + len(row.scored.token_ids)]
                prompt_logprobs.append(
                    self.sampler.prompt_logprobs(row.slot, self.model.logits, states, row.scored.token_ids)
                )
            token += row.num_tokens
            if row.sample:
                last.append(token)
        if not last:
            return None, None, tuple(prompt_logprobs)
        if len(last) < hidden.shape[0]:
            hidden = hidden[upload(last, self.device)]
        return self.model.logits(hidden), None, tuple(prompt_logprobs)

    def _open(self, slot: int, opened: OpenSlot) -> None:
        self.sampler.open(slot, opened)
        grammar = opened.sampling.grammar
        compiled = None
        if grammar is not None:
            assert self._compiler is not None
            compiled = self._compiler.compiled(grammar)
        self.grammars.open(slot, opened, compiled)
