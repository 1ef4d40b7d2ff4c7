"""The model on one rank, with everything that lives as long as it: KV pool, backend, sampler, request slots."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from baleen.attention.backend import make_backend
from baleen.config import Config
from baleen.kernels import dispatch
from baleen.messages import ScheduledBatch, StepOutput
from baleen.model.deepseek_v32 import DeepseekV32ForCausalLM
from baleen.model.weights import fill_randomly, load_weights
from baleen.runner.inputs import RequestSlots
from baleen.sampling.sampler import Sampler


class ModelRunner:
    """Loads the model of `config`; `execute` runs one step. One thread calls it at a time, steps in the order
    scheduled.

    forward_seconds  time spent in `execute`'s model forward since start (host clock), for benchmarks and /server_info
    """

    def __init__(self, config: Config, *, progress: bool = False) -> None:
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
        self.sampler = Sampler(max_running, config.model.vocab_size, self.device)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Run one step and sample the rows that ask for it. Raises nothing for bad logits: such a row samples -1."""
        for row in batch.rows:
            self.slots.update(row)
            if row.open is not None:
                self.sampler.open(row.slot, row.open)
        inputs = self.slots.forward_batch(batch)
        started = time.perf_counter()
        metadata = self.backend.plan(inputs)
        hidden = self.model(inputs.ids, inputs.positions, self.backend, metadata)
        last, sampled = [], []
        token = -1
        for row in batch.rows:
            token += row.num_tokens
            if row.sample:
                last.append(token)
                sampled.append(row)
        if not sampled:
            self.forward_seconds += time.perf_counter() - started
            return StepOutput(batch.step, ())
        logits = self.model.logits(hidden if len(last) == hidden.shape[0] else hidden[last])
        self.forward_seconds += time.perf_counter() - started
        slots = [row.slot for row in sampled]
        tokens = self.sampler.sample(logits, slots, [row.start + row.num_tokens for row in sampled])
        # -1 marks bad logits; the step in flight must still find an id
        self.slots.last_ids[slots] = tokens.ids.clamp_min(0)
        return StepOutput(batch.step, tuple(tokens.ids.tolist()), tuple(tokens.logprobs or ()))
