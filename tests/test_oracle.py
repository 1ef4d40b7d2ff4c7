"""baleen against transformers' DeepseekV32ForCausalLM on the same random weights, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baleen.llm import LLM
from tests.oracle import greedy, load_reference, random_prompts, relative_error, run_greedy, save_model, teacher_forced

NUM_TOKENS = 64
LENGTHS = [150, 9, 310, 64, 33]
TOLERANCE = 1e-4

# how the same requests are run; every one must give the tokens and logits of transformers
WAYS: dict[str, dict[str, Any]] = {
    "one-shot prefill": {"chunked_prefill_size": 1024},
    "small chunks beside decode": {"chunked_prefill_size": 64, "max_running_requests": 5, "disable_radix_cache": True},
    "absorbed prefill": {"dense_prefill_threshold": 0},
    "multi-head prefill under the mask": {"dense_prefill_threshold": 4096},
    "no overlap": {"disable_overlap_schedule": True},
    "retraction": {"max_total_tokens": 13 * 64, "schedule_conservativeness": 0.01},
}


@pytest.fixture(scope="module", params=[0, 1, 2])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, list, list]:
    """A model, prompts, and transformers' greedy tokens and logits for them."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, request.param)
    assert len(list(folder.glob("*.safetensors"))) > 5
    model = load_reference(folder)
    prompts = random_prompts(LENGTHS, request.param)
    tokens = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    logits = [teacher_forced(model, prompt + answer) for prompt, answer in zip(prompts, tokens)]
    return folder, prompts, tokens, logits


def check(llm: LLM, prompts: list, tokens: list, logits: list) -> None:
    answers, recorded = run_greedy(llm, prompts, NUM_TOKENS)
    for prompt, answer, expected, ours, theirs in zip(prompts, answers, tokens, recorded, logits):
        assert answer.token_ids == expected
        assert sorted(ours) == list(range(len(prompt), len(prompt) + NUM_TOKENS))
        for position, row in ours.items():
            assert relative_error(row, theirs[position - 1]) < TOLERANCE
    llm.engine.scheduler.check_invariants()


@pytest.mark.parametrize("way", WAYS)
def test_tokens_and_logits(case: tuple, way: str) -> None:
    folder, prompts, tokens, logits = case
    with LLM(str(folder), **WAYS[way]) as llm:
        check(llm, prompts, tokens, logits)
        if way == "retraction":
            assert llm.engine.stats().num_retractions_total > 0


def test_odd_chunks(case: tuple) -> None:
    """Prefill in chunks of 37 tokens, less what decode takes of them: no chunk ends where a page does."""
    folder, prompts, tokens, logits = case
    with LLM(str(folder)) as llm:
        llm.engine.scheduler._step_tokens = 37
        check(llm, prompts, tokens, logits)


def test_prefix_cache_hit(case: tuple) -> None:
    """The second run reads its prompts from the cache the first one filled, index keys included."""
    folder, prompts, tokens, logits = case
    with LLM(str(folder)) as llm:
        llm.generate(prompts)
        check(llm, prompts, tokens, logits)
        cached = llm.generate(prompts)
        assert [c.num_cached_tokens for c in cached] == [(len(p) - 1) // 64 * 64 for p in prompts]


def test_one_token_at_a_time_through_long_context(tmp_path: Path) -> None:
    """Decode far past index_topk: 32 of 900 tokens are attended, and the answer is still transformers'."""
    save_model(tmp_path, 7)
    model = load_reference(tmp_path)
    prompts = random_prompts([900], 7)
    with LLM(str(tmp_path), chunked_prefill_size=128) as llm:
        check(llm, prompts, [greedy(model, prompts[0], NUM_TOKENS)], [
            teacher_forced(model, prompts[0] + greedy(model, prompts[0], NUM_TOKENS))
        ])  # fmt: skip


def test_selection_matters(case: tuple) -> None:
    """The oracle would notice a wrong selection: with the index gates negated the logits are off by far more than the
    tolerance.
    """
    folder, prompts, _, logits = case
    with LLM(str(folder)) as llm:
        for layer in llm.engine.runner.model.layers:
            layer.self_attn.indexer.weights_proj.data.neg_()
        _, recorded = run_greedy(llm, prompts[2:3], 1)
        assert relative_error(recorded[0][len(prompts[2])], logits[2][len(prompts[2]) - 1]) > 100 * TOLERANCE
        assert torch.isfinite(recorded[0][len(prompts[2])]).all()
