"""Masks on logits, step by step, without a model: the text is what a seeded walk through the allowed tokens gives."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
import torch

from baleen.messages import Grammar, OpenSlot, SamplingParams
from baleen.sampling import grammar as grammar_module
from baleen.sampling.conftest import EOS, THINK_END, TOKENS, VOCAB_SIZE, Compile
from baleen.sampling.grammar import GrammarMasks

SLOTS = 4
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"enum": [1, "x"]}, "maxItems": 3}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
}


@pytest.fixture
def masks() -> Iterator[GrammarMasks]:
    masks = GrammarMasks(SLOTS, VOCAB_SIZE, "cpu")
    yield masks
    masks.close()


def opened(kind: Any = "regex", text: str = "ab", history: Sequence[int] = (), **fields: Any) -> OpenSlot:
    grammar = Grammar(kind=kind, text=text, starts_after=fields.pop("starts_after", None))
    return OpenSlot(
        sampling=SamplingParams(grammar=grammar, **fields), pages=(), num_prompt=2, history=(5, 5, *history)
    )


def allowed(masks: GrammarMasks, slot: int = 0) -> set[int]:
    """The ids whose logits the mask leaves; the others are -inf."""
    logits = torch.arange(VOCAB_SIZE).float()[None]
    masked, errors = masks.mask(logits, [slot])
    assert not errors
    assert torch.equal(logits[0], torch.arange(VOCAB_SIZE).float()), "the argument was changed"
    kept = masked[0] > -torch.inf
    assert torch.equal(masked[0][kept], logits[0][kept])
    return set(kept.nonzero()[:, 0].tolist())


def ids_of(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def test_a_walk_through_the_masks_is_a_text_of_the_grammar(masks: GrammarMasks, compiled: Compile) -> None:
    grammar = compiled("json_schema", json.dumps(SCHEMA))
    for seed in range(20):
        draw = random.Random(seed)
        masks.open(0, opened(), grammar)
        text = b""
        while EOS not in (choices := allowed(masks)):
            token = draw.choice(sorted(choices))
            text += TOKENS[token]
            masks.advance([0], lambda token=token: [token])  # type: ignore[misc]
        assert choices == {EOS}
        jsonschema.validate(json.loads(text), SCHEMA)


def test_slots_are_apart(masks: GrammarMasks, compiled: Compile) -> None:
    """Free rows stay as they are, in whatever order the rows come; a slot opened anew forgets its grammar."""
    masks.open(3, opened(), compiled("regex", "ab"))
    masks.open(1, opened(), compiled("regex", "xy"))
    logits = torch.zeros(3, VOCAB_SIZE)
    masked, _ = masks.mask(logits, [1, 0, 3])
    assert [(row > -torch.inf).sum().item() for row in masked] == [1, VOCAB_SIZE, 1]
    assert (masked[0, ids_of("x")], masked[2, ids_of("a")]) == (0, 0)
    masks.advance([3, 0, 1], lambda: [*ids_of("a"), 7, *ids_of("x")])
    assert allowed(masks, 3) == set(ids_of("b"))
    assert allowed(masks, 1) == set(ids_of("y"))
    masks.open(3, OpenSlot(sampling=SamplingParams(), pages=(), num_prompt=1), None)
    assert allowed(masks, 3) == set(range(VOCAB_SIZE))
    same, _ = masks.mask(logits, [0, 2])
    assert same is logits


def test_after_the_end_the_row_is_free(masks: GrammarMasks, compiled: Compile) -> None:
    """The step that is in flight when eos is sampled still has a row for the request: it must not be empty."""
    masks.open(0, opened(), compiled("regex", "a"))
    masks.advance([0], lambda: ids_of("a"))
    assert allowed(masks) == {EOS}
    masks.advance([0], lambda: [EOS])
    assert allowed(masks) == set(range(VOCAB_SIZE))
    masks.advance([0], lambda: [77])
    assert allowed(masks) == set(range(VOCAB_SIZE))


def test_free_until_the_thinking_ends(masks: GrammarMasks, compiled: Compile) -> None:
    masks.open(0, opened(starts_after=THINK_END), compiled("regex", "ab"))
    for token in (9, EOS, 260, 12):
        assert allowed(masks) == set(range(VOCAB_SIZE))
        masks.advance([0], lambda token=token: [token])  # type: ignore[misc]
    masks.advance([0], lambda: [THINK_END])
    assert allowed(masks) == set(ids_of("a"))


def test_with_ignore_eos_the_thinking_has_no_eos(masks: GrammarMasks, compiled: Compile) -> None:
    """The eos at the grammar's end ends the request even so; one before would end it without an answer."""
    masks.open(0, opened(starts_after=THINK_END, ignore_eos=True), compiled("regex", "a"))
    masks.open(1, opened(starts_after=THINK_END, ignore_eos=True), compiled("regex", "b"))
    for slot, text in ((0, "a"), (1, "b")):
        assert allowed(masks, slot) == set(range(VOCAB_SIZE)) - {EOS}
        masks.advance([slot], lambda: [THINK_END])
        assert allowed(masks, slot) == set(ids_of(text))
        masks.advance([slot], lambda text=text: ids_of(text))  # type: ignore[misc]
        assert allowed(masks, slot) == {EOS}


@pytest.mark.parametrize("starts_after", [None, THINK_END])
def test_a_retracted_request_goes_on_where_it_was(
    masks: GrammarMasks, compiled: Compile, starts_after: int | None
) -> None:
    grammar = compiled("json_schema", json.dumps(SCHEMA))
    output = ([9, 9, THINK_END] if starts_after else []) + ids_of('{"a": [1, ')
    masks.open(0, opened(starts_after=starts_after), grammar)
    for token in output:
        masks.advance([0], lambda token=token: [token])  # type: ignore[misc]
    for end in range(len(output) + 1):
        masks.open(1, opened(starts_after=starts_after, history=output[:end]), grammar)
    assert allowed(masks, 1) == allowed(masks, 0)
    assert allowed(masks, 1) < set(range(VOCAB_SIZE))


def test_a_token_against_the_grammar_ends_the_request_alone(masks: GrammarMasks, compiled: Compile) -> None:
    for slot in (0, 1):
        masks.open(slot, opened(), compiled("regex", "ab"))
    masks.advance([0, 1], lambda: [*ids_of("z"), *ids_of("a")])
    masked, errors = masks.mask(torch.zeros(2, VOCAB_SIZE), [1, 0])
    assert [(error.row, error.status) for error in errors] == [(1, 500)]
    assert "against the grammar" in errors[0].message
    assert (masked[0] > -torch.inf).nonzero()[:, 0].tolist() == ids_of("b")
    assert (masked[1] == 0).all(), "a row is never left without a token"


def test_an_error_of_the_library_ends_the_request_alone(
    masks: GrammarMasks, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in (0, 1):
        masks.open(slot, opened(), compiled("regex", "ab"))
    allowed(masks)

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("broken")

    masks._slots[0]._matcher = Broken()
    masks.advance([0, 1], lambda: [*ids_of("a"), *ids_of("a")])
    _, errors = masks.mask(torch.zeros(2, VOCAB_SIZE), [0, 1])
    assert [(error.row, error.status, error.message) for error in errors] == [(0, 500, "regex: RuntimeError: broken")]
    assert allowed(masks, 1) == set(ids_of("b"))


def test_a_dead_end_is_an_error_and_not_an_empty_row(masks: GrammarMasks) -> None:
    """With the real vocabulary every byte is a token; with this one the grammar's "b" is not."""
    from baleen.sampling.grammar_text import GrammarReader, Vocabulary

    tokens = [b"" if token == b"b" else token for token in TOKENS]
    reader = GrammarReader(Vocabulary(tokens, {EOS: "<｜end▁of▁sentence｜>"}, [EOS]))
    masks.open(0, opened(), reader.compile(Grammar(kind="regex", text="ab")))
    masks.advance([0], lambda: ids_of("a"))
    masked, errors = masks.mask(torch.zeros(1, VOCAB_SIZE), [0])
    assert [(error.status, error.message) for error in errors] == [(400, "regex: no token can follow")]
    assert (masked == 0).all()


def test_a_slow_mask_ends_its_request(masks: GrammarMasks, compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "SLOW_MASK_SECONDS", -1.0)
    masks.open(0, opened(), compiled("regex", "ab"))
    _, errors = masks.mask(torch.zeros(1, VOCAB_SIZE), [0])
    assert errors[0].status == 400
    assert "too ambiguous" in errors[0].message


def test_a_failed_row_is_passed_over(masks: GrammarMasks, compiled: Compile) -> None:
    """-1: the row's logits were bad. Its request ends for that."""
    masks.open(0, opened(), compiled("regex", "ab"))
    masks.advance([0], lambda: [-1])
    assert allowed(masks) == set(ids_of("a"))


def test_advance_does_not_wait_for_the_tokens(masks: GrammarMasks, compiled: Compile) -> None:
    """They may be on their way from the device; the forward of the next step goes on meanwhile."""
    masks.open(0, opened(), compiled("regex", "ab"))
    arrived = threading.Event()

    def token_ids() -> list[int]:
        assert arrived.wait(30)
        return ids_of("a")

    masks.advance([0], token_ids)
    arrived.set()
    assert allowed(masks) == set(ids_of("b"))
    assert masks.mask_seconds > 0
    assert masks.wait_seconds > 0
