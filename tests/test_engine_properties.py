"""The real engine under any schedule: each request gets the tokens it gets alone, and no page is lost or shared by
mistake.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV32ForCausalLM

from baleen.engine import Engine
from baleen.flags import default_config
from baleen.messages import GenerateRequest, SamplingParams, pack_ids
from tests.oracle import load_reference, random_prompts, save_model, teacher_forced

# Prompts that share prefixes of one, two and no pages, so that the cache has something to give and to evict; most end
# just before a page does, so that they need another one while they decode.
_BASE = random_prompts([200], 5)[0]
PROMPTS = [
    _BASE[:190],
    _BASE[:130] + random_prompts([59], 6)[0],
    _BASE[:70] + random_prompts([55], 7)[0],
    random_prompts([126], 8)[0],
    random_prompts([3], 9)[0],
    _BASE[:65],
    _BASE[:64],
    _BASE[:1],
]
MAX_TOKENS = 40


@dataclass
class Model:
    folder: Path
    reference: DeepseekV32ForCausalLM
    alone: dict[tuple[int, bool], list[int]]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    folder = Path(tempfile.mkdtemp())
    save_model(folder, 3, num_hidden_layers=2)
    found = Model(folder, load_reference(folder), {})
    engine = Engine(default_config(folder))
    for sampled in (False, True):
        for i in range(len(PROMPTS)):
            run = Run(engine)
            run.add("x", i, MAX_TOKENS, sampled)
            run.finish()
            found.alone[i, sampled] = run.tokens["x"]
            assert engine.flush_cache().ok
    engine.close()
    yield found
    shutil.rmtree(folder)


class Run:
    """Requests going through one engine; invariants are checked after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    def add(self, rid: str, prompt: int, num_tokens: int, sampled: bool) -> None:
        self.tokens[rid] = []
        sampling = SamplingParams(
            temperature=1.0 if sampled else 0.0, seed=prompt, max_new_tokens=num_tokens, ignore_eos=True
        )
        self.engine.add(GenerateRequest(rid=rid, input_ids=pack_ids(PROMPTS[prompt]), sampling=sampling))

    def step(self) -> None:
        for output in self.engine.step():
            assert output.rid not in self.ended, "output after the end"
            self.tokens[output.rid] += output.token_ids
            if output.finish_reason is not None:
                assert output.finish_reason == "length", output.message
                self.ended.add(output.rid)
        self.engine.scheduler.check_invariants()

    def abort(self, rid: str) -> None:
        self.engine.abort(rid)
        self.ended.add(rid)
        self.engine.scheduler.check_invariants()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()
        assert self.ended == set(self.tokens)


REQUEST = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, MAX_TOKENS),
    st.booleans(),
    st.integers(0, 6),  # steps before it arrives
    st.none() | st.integers(0, 25),  # aborted so many steps after
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=7),
    chunk=st.sampled_from([64, 128, 512]),
    pages=st.integers(4, 14),
    max_running=st.integers(1, 7),
    policy=st.sampled_from(["fcfs", "lpm"]),
    cached=st.booleans(),
    overlap=st.booleans(),
    conservativeness=st.sampled_from([0.01, 1.0]),
)
def test_any_schedule_gives_the_tokens_of_a_request_alone(
    model: Model,
    requests: list[tuple[int, int, bool, int, int | None]],
    chunk: int,
    pages: int,
    max_running: int,
    policy: str,
    cached: bool,
    overlap: bool,
    conservativeness: float,
) -> None:
    engine = Engine(
        default_config(
            model.folder,
            chunked_prefill_size=chunk,
            max_total_tokens=pages * 64,
            max_running_requests=max_running,
            schedule_policy=policy,
            disable_radix_cache=not cached,
            disable_overlap_schedule=not overlap,
            schedule_conservativeness=conservativeness,
        )
    )
    run = Run(engine)
    aborts: list[tuple[int, str]] = []
    now = 0
    for i, (prompt, num_tokens, sampled, wait, abort_after) in enumerate(requests):
        for _ in range(wait):
            run.step()
            now += 1
        run.add(str(i), prompt, num_tokens, sampled)
        if abort_after is not None:
            aborts.append((now + abort_after, str(i)))
        for at, rid in aborts:
            if at <= now and rid not in run.ended:
                run.abort(rid)
    for _ in range(25):
        run.step()
        now += 1
        for at, rid in aborts:
            if at <= now and rid not in run.ended:
                run.abort(rid)
    run.finish()
    for i, (prompt, num_tokens, sampled, _, abort_after) in enumerate(requests):
        expected = model.alone[prompt, sampled][:num_tokens]
        got = run.tokens[str(i)]
        if abort_after is not None:
            expected = expected[: len(got)]
        if got != expected:
            assert near_tie(model, prompt, got, expected), (i, got, expected)
    stats = engine.stats()
    assert stats.num_free_pages + stats.num_cached_pages == pages
    assert engine.flush_cache().ok
    assert engine.stats().num_free_pages == pages
    engine.close()


def near_tie(model: Model, prompt: int, got: list[int], expected: list[int]) -> bool:
    """Where the two part, the two tokens' logits lie within rounding of each other, so that either is right."""
    assert len(got) == len(expected)
    at = next(i for i, (a, b) in enumerate(zip(got, expected)) if a != b)
    logits = teacher_forced(model.reference, PROMPTS[prompt] + expected[:at])[-1]
    return bool((logits[got[at]] - logits[expected[at]]).abs() < 1e-4 * logits.abs().max())


def test_the_tight_budgets_do_retract_and_evict(model: Model) -> None:
    """The property above is only worth something if its examples reach retraction, eviction and cache hits."""
    torch.manual_seed(0)
    engine = Engine(default_config(model.folder, max_total_tokens=8 * 64, schedule_conservativeness=0.01))
    run = Run(engine)
    for i in range(len(PROMPTS)):
        run.add(str(i), i, MAX_TOKENS, False)
    run.finish()
    stats = engine.stats()
    assert stats.num_retractions_total > 0
    assert stats.num_cached_tokens_total > 0
    for i in range(len(PROMPTS)):
        if run.tokens[str(i)] != model.alone[i, False]:
            assert near_tie(model, i, run.tokens[str(i)], model.alone[i, False])
    engine.close()
