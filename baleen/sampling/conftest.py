"""A vocabulary of single bytes and DeepSeek's marks, and grammars compiled for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import xgrammar

from baleen.messages import Grammar
from baleen.sampling.grammar_text import GrammarReader, Vocabulary

EOS = 1
MARKS = {
    0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 2: "<｜▁pad▁｜>", 259: "｜DSML｜", 260: "<think>",
    261: "</think>", 262: "<｜User｜>", 263: "<｜tool▁calls▁begin｜>", 264: "<｜tool▁calls▁end｜>",
    265: "<｜tool▁call▁begin｜>", 266: "<｜tool▁call▁end｜>", 267: "<｜tool▁sep｜>",
}  # fmt: skip
THINK_END = 261
VOCAB_SIZE = 288  # the last rows have no token
TOKENS = [MARKS[i].encode() if i in MARKS else bytes([i - 3]) if i < 259 else b"" for i in range(VOCAB_SIZE)]

Kind = Literal["json_schema", "regex", "ebnf", "structural_tag", "tools"]
Compile = Callable[[Kind, str], Any]


def byte_vocabulary() -> Vocabulary:
    return Vocabulary(TOKENS, MARKS, [EOS])


@pytest.fixture(scope="session")
def reader() -> GrammarReader:
    return GrammarReader(byte_vocabulary())


@pytest.fixture(scope="session")
def compiled(reader: GrammarReader) -> Compile:
    return lambda kind, text: reader.compile(Grammar(kind=kind, text=text))


def is_text_of(compiled: Any, text: str | bytes) -> bool:
    """The grammar allows the whole text, byte by byte."""
    matcher = xgrammar.GrammarMatcher(compiled)
    return bool(matcher.accept_string(text) and matcher.is_completed())


def allowed(matcher: Any, vocab_size: int = VOCAB_SIZE) -> set[int]:
    """The ids that may come next, read from the mask bit by bit."""
    mask = xgrammar.allocate_token_bitmask(1, vocab_size)
    matcher.fill_next_token_bitmask(mask)
    words = [word & 0xFFFFFFFF for word in mask[0].tolist()]
    return {i for i in range(vocab_size) if words[i // 32] >> i % 32 & 1}
