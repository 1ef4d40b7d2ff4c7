"""The model on one rank, with everything that lives as long as it: KV pool, backend, sampler, request slots."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from baleen.attention.backend import make_backend
from baleen.config import Config
from baleen.kernels import dispatch
from baleen.messages import OpenSlot, ScheduledBatch, StepOutput
from baleen.model.deepseek_v32 import DeepseekV32ForCausalLM
from baleen.model.weights import fill_randomly, load_weights
from baleen.runner.inputs import RequestSlots
from baleen.sampling.grammar import GrammarMasks
from baleen.sampling.grammar_compiler import GrammarCompiler
from baleen.sampling.sampler import Sampler


class ModelRunner:
    """Loads the model of `config`; `execute` runs one step. One thread calls it at a time, steps in the order
    scheduled.

    compiler         has compiled the grammar of every request that comes; None if none has one
    forward_seconds  time spent in `execute`'s model forward since start (host clock), for benchmarks and /server_info
    """

    def __init__(self, config: Config, compiler: GrammarCompiler | None = None, *, progress: bool = False) -> None:
        dispatch.use(config.attention.kernels)
        self.device = torch.device(config.load.device)
        self.num_pages = config.cache.max_total_tokens // config.cache.page_size
        self.forward_seconds = 0.0
        started = time.monotonic()
        dtype = getattr(torch, config.load.dtype)
        self.model = DeepseekV32ForCausalLM(config.model, dtype, config.load.context_length)
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
            prefill=config.attention.prefill_backend,
            decode=config.attention.decode_backend,
            dense_prefill_threshold=config.attention.dense_prefill_threshold,
            device=self.device,
        )
        max_running = config.scheduler.max_running_requests
        self.slots = RequestSlots(max_running, config.load.context_length, self.device)
        self.sampler = Sampler(max_running, config.model.vocab_size, self.device, config.model.eos_token_ids)
        self.grammars = GrammarMasks(max_running, config.model.vocab_size, self.device)
        self._compiler = compiler

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Run one step and sample the rows that ask for it. Raises nothing for bad logits: such a row samples -1."""
        for row in batch.rows:
            self.slots.update(row)
            if row.open is not None:
                self._open(row.slot, row.open)
        inputs = self.slots.forward_batch(batch)
        started = time.perf_counter()
        metadata = self.backend.plan(inputs)
        hidden = self.model(inputs.ids, inputs.positions, self.backend, metadata)
        last, sampled, prompt_logprobs = [], [], []
        token = -1
        for row in batch.rows:
            if row.scored is not None:
                first = token + 1 + row.scored.start - row.start
                states = hidden[first : first + len(row.scored.token_ids)]
                prompt_logprobs.append(
                    self.sampler.prompt_logprobs(row.slot, self.model.logits, states, row.scored.token_ids)
                )
            token += row.num_tokens
            if row.sample:
                last.append(token)
                sampled.append(row)
        if not sampled:
            self.forward_seconds += time.perf_counter() - started
            return StepOutput(batch.step, (), prompt_logprobs=tuple(prompt_logprobs))
        logits = self.model.logits(hidden if len(last) == hidden.shape[0] else hidden[last])
        self.forward_seconds += time.perf_counter() - started
        slots = [row.slot for row in sampled]
        masked, errors = self.grammars.mask(logits, slots)
        tokens = self.sampler.sample(masked, slots, [row.start + row.num_tokens for row in sampled], logits)
        # -1 marks bad logits; the step in flight must still find an id
        self.slots.last_ids[slots] = tokens.ids.clamp_min(0)
        ids = tuple(tokens.ids.tolist())
        self.grammars.advance(slots, lambda: ids)
        return StepOutput(batch.step, ids, tuple(tokens.logprobs or ()), tuple(prompt_logprobs), errors)

    def _open(self, slot: int, opened: OpenSlot) -> None:
        self.sampler.open(slot, opened)
        grammar = opened.sampling.grammar
        compiled = None
        if grammar is not None:
            assert self._compiler is not None
            compiled = self._compiler.compiled(grammar)
        self.grammars.open(slot, opened, compiled)
