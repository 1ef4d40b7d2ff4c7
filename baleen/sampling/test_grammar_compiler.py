"""Compiling beside the loop: once, on other threads, for a bounded time. Slow ones: played by a reader that waits."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from baleen.messages import Grammar
from baleen.sampling import grammar_compiler
from baleen.sampling.conftest import byte_vocabulary, is_text_of
from baleen.sampling.grammar_compiler import GrammarCompiler
from baleen.sampling.grammar_text import GrammarError, GrammarReader

WAIT = 30.0


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_vocabulary)


class Gate:
    """Holds back the compilation of texts that start with "slow"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        compile_now = GrammarReader.compile

        def compile_later(reader: GrammarReader, grammar: Grammar) -> Any:
            if grammar.text.startswith("slow"):
                self.begun.release()
                assert self.open.wait(WAIT)
            return compile_now(reader, grammar)

        monkeypatch.setattr(GrammarReader, "compile", compile_later)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.submit(Grammar(kind="regex", text="a+"))
    again = compiler.submit(Grammar(kind="regex", text="a+", starts_after=5))
    other = compiler.submit(Grammar(kind="ebnf", text='root ::= "b"'))
    assert first.result(WAIT) is again.result(WAIT)
    assert is_text_of(first.result(), "aa")
    assert is_text_of(other.result(WAIT), "b")
    assert compiler.compiled(Grammar(kind="regex", text="a+", starts_after=7)) is first.result()
    assert (compiler.num_compiled, compiler.num_failed) == (2, 0)
    assert compiler.compile_seconds > 0


def test_a_failure_is_told_to_all_and_not_tried_again(compiler: GrammarCompiler) -> None:
    for _ in range(3):
        with pytest.raises(GrammarError, match="parenthesis"):
            compiler.submit(regex("(")).result(WAIT)
    assert (compiler.num_compiled, compiler.num_failed) == (0, 1)


def test_a_missing_vocabulary_is_an_error_of_the_request() -> None:
    def missing() -> Any:
        raise ValueError("no tokenizer.json")

    with pytest.raises(GrammarError, match=r"no tokenizer\.json"):
        GrammarCompiler(missing).submit(regex("a")).result(WAIT)


def test_what_no_text_matches_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="no text matches"):
        compiler.submit(Grammar(kind="ebnf", text='root ::= root "a"')).result(WAIT)


def test_a_million_repetitions_are_no_trouble(compiler: GrammarCompiler) -> None:
    compiled = compiler.submit(regex("([ab]{1000}){1000}")).result(WAIT)
    assert not is_text_of(compiled, "ab")


def test_a_slow_grammar_holds_up_no_other(compiler: GrammarCompiler, gate: Gate) -> None:
    slow = compiler.submit(regex("slow"))
    assert gate.begun.acquire(timeout=WAIT)
    assert compiler.submit(regex("fast")).result(WAIT)
    assert not slow.done()
    gate.open.set()
    assert is_text_of(slow.result(WAIT), "slow")


def test_a_grammar_that_takes_too_long_fails(
    compiler: GrammarCompiler, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = compiler.submit(regex("slow"))
    assert gate.begun.acquire(timeout=WAIT)
    compiler.expire()
    assert not slow.done()
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 0.0)
    compiler.expire()
    with pytest.raises(GrammarError, match="takes longer") as error:
        slow.result(0)
    assert error.value.status == 400
    gate.open.set()
    assert compiler.submit(regex("slow")).exception(WAIT) is error.value, "it is not tried again"
    assert compiler.submit(regex("fast")).result(WAIT)
    assert compiler.num_failed == 1


def test_threads_that_cannot_be_stopped_are_few(
    compiler: GrammarCompiler, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many as are allowed, further grammars wait, then get a 503; when they come back all is well."""
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 0.0)
    for i in range(grammar_compiler.MAX_OVERDUE):
        slow = compiler.submit(regex(f"slow{i}"))
        assert gate.begun.acquire(timeout=WAIT)
        compiler.expire()
        assert slow.done()
    monkeypatch.undo()
    waiting = compiler.submit(regex("fast"))
    compiler.expire()
    assert not waiting.done()
    monkeypatch.setattr(grammar_compiler, "WAIT_SECONDS", 0.0)
    compiler.expire()
    with pytest.raises(GrammarError, match="try again later") as error:
        waiting.result(0)
    assert error.value.status == 503
    monkeypatch.undo()
    gate.open.set()
    assert compiler.submit(regex("fast")).result(WAIT)


def test_what_a_request_holds_stays(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "CACHE_ENTRIES", 1)
    held = compiler.submit(regex("a")).result(WAIT)
    for text in ("b", "c"):
        compiler.submit(regex(text)).result(WAIT)
    gc.collect()
    assert compiler.compiled(regex("a")) is held
    assert compiler.submit(regex("a")).result(0) is held, "it is not compiled anew"
    with pytest.raises(KeyError):
        compiler.compiled(regex("b"))
    assert compiler.num_compiled == 3


def test_the_cache_is_bounded_by_bytes(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "CACHE_BYTES", 0)
    compiler.submit(regex("a")).result(WAIT)
    compiler.submit(regex("b")).result(WAIT)
    compiler.submit(regex("c"))
    with pytest.raises(KeyError):
        compiler.compiled(regex("a"))


def test_a_mask_that_takes_too_long_is_refused(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "SLOW_MASK_SECONDS", -1.0)
    with pytest.raises(GrammarError, match="too ambiguous"):
        compiler.submit(regex("a")).result(WAIT)


def test_submitting_takes_no_time(compiler: GrammarCompiler, gate: Gate) -> None:
    """Not a measurement: the thread that submits does nothing that waits for the compiling one."""
    results = [compiler.submit(regex(f"slow{i}")) for i in range(20)]
    assert not any(result.done() for result in results)
    gate.open.set()
    deadline = time.monotonic() + WAIT
    while not all(result.done() for result in results):
        assert time.monotonic() < deadline
        compiler.expire()
        time.sleep(0.001)
    assert compiler.num_compiled == 20
