"""What the end-to-end tests share: random models saved by `transformers`, its answers, and the logits baleen computes
on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from baleen.llm import LLM, Completion
from baleen.messages import SamplingParams, ScheduledBatch
from baleen.model.random_checkpoint import write_tokenizer
from baleen.sampling.sampler import SampledTokens

CONTEXT = 1024


def save_model(folder: Path, seed: int, **changes: Any) -> DeepseekV32ForCausalLM:
    """A random small model, saved by transformers in several shards: 16 index heads, top-k 32 of up to 1024 tokens,
    yarn active.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "index_n_heads": 16,
        "index_head_dim": 64,
        "index_topk": 32,
        "max_position_embeddings": CONTEXT,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**{**settings, **changes})).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.copy_(torch.randn_like(value) * 0.3 + ("bias" not in name))
            else:
                value.copy_(torch.randn_like(value) * (1.0 if "embed" in name else value.shape[-1] ** -0.5))
        for name, value in model.named_buffers():
            if "e_score_correction_bias" in name:
                value.copy_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder, max_shard_size="400KB")
    write_tokenizer(folder, CONTEXT)
    return model


def load_reference(folder: Path) -> DeepseekV32ForCausalLM:
    """transformers' own loader, float32."""
    return DeepseekV32ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_prompts(lengths: list[int], seed: int, vocab_size: int = 320) -> list[list[int]]:
    """Prompts of these lengths, without the first ids (bos, eos, pad)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def greedy(model: DeepseekV32ForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' generate with its cache."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def teacher_forced(model: DeepseekV32ForCausalLM, ids: list[int]) -> Tensor:
    """Logits of every position in one forward: [len(ids), vocab]."""
    return model(torch.tensor([ids])).logits[0]


class LogitsOf:
    """Records the logits baleen samples from, as `logits[rid][position of the sampled token]`."""

    def __init__(self, llm: LLM) -> None:
        self.logits: dict[str, dict[int, Tensor]] = {}
        self._rid_of_slot: dict[int, dict[int, str]] = {}  # step -> slot -> rid
        self._step = -1
        scheduler, runner = llm.engine.scheduler, llm.engine.runner
        schedule, execute, sample = scheduler.schedule, runner.execute, runner.sampler.sample

        def recording_schedule() -> ScheduledBatch | None:
            batch = schedule()
            if batch is not None:
                self._rid_of_slot[batch.step] = {r.slot: r.rid for r in scheduler._running.values()}
            return batch

        def recording_execute(batch: ScheduledBatch) -> Any:
            self._step = batch.step
            return execute(batch)

        def recording_sample(
            logits: Tensor, slots: Sequence[int], positions: Sequence[int], unmasked: Tensor | None = None
        ) -> SampledTokens:
            for row, slot, position in zip(logits.clone(), slots, positions):
                rid = self._rid_of_slot[self._step].get(slot)
                if rid is not None:
                    self.logits.setdefault(rid, {})[position] = row
            return sample(logits, slots, positions, unmasked)

        scheduler.schedule = recording_schedule  # type: ignore[method-assign]
        runner.execute = recording_execute  # type: ignore[method-assign]
        runner.sampler.sample = recording_sample  # type: ignore[method-assign]


def run_greedy(llm: LLM, prompts: list[list[int]], num_tokens: int) -> tuple[list[Completion], list[dict[int, Tensor]]]:
    """Greedy answers and the logits behind them, request by request."""
    recorder = LogitsOf(llm)
    answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True))
    return answers, [recorder.logits[rid] for rid in sorted(recorder.logits, key=int)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((got - expected).abs().max() / expected.abs().max())
