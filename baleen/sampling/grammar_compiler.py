"""Compiles grammars beside the engine's loop: on threads of its own, each grammar once, for a bounded time."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from baleen.messages import Grammar
from baleen.sampling.grammar_text import GrammarError, GrammarReader, Vocabulary, load_xgrammar

COMPILE_SECONDS = 20.0  # then its requests end with an error
WAIT_SECONDS = 60.0  # for a thread
MAX_THREADS = 2
# Threads whose grammar took too long: nothing can stop xgrammar. While there are so many no other grammar is begun.
MAX_OVERDUE = 2
SLOW_MASK_SECONDS = 1.0  # a mask that takes longer holds up every request's step
CACHE_BYTES = 256 << 20
CACHE_ENTRIES = 512

_Key = tuple[str, str]


class _Job(NamedTuple):
    """since: when it was asked for, then when it was begun"""

    key: _Key
    grammar: Grammar
    result: Future[Any]
    since: float


class GrammarCompiler:
    """xgrammar's compiled grammars by kind and text. Its methods are for one thread; `compiled` is for any.

    A grammar stays while a request holds its result, and after that while it is among the last used that fit
    CACHE_BYTES. Failures stay too, so that a grammar that cannot be compiled is tried once.

    load_vocabulary  called once, with the first grammar, on a compiling thread
    """

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self.num_compiled = 0
        self.num_failed = 0
        self.compile_seconds = 0.0
        self._load_vocabulary = load_vocabulary
        self._reader: GrammarReader | None = None
        self._reader_lock = threading.Lock()
        self._cache: OrderedDict[_Key, Future[Any]] = OrderedDict()
        self._held: WeakValueDictionary[_Key, Any] = WeakValueDictionary()
        self._jobs: deque[_Job] = deque()
        self._active: dict[_Key, _Job] = {}
        self._num_overdue = 0
        self._lock = threading.RLock()  # of the three above and the counters

    def submit(self, grammar: Grammar) -> Future[Any]:
        """The compiled grammar to come. Its exception is GrammarError; keep the result as long as it is needed."""
        key = (grammar.kind, grammar.text)
        with self._lock:
            result = self._cache.get(key)
            if result is None:
                result = self._cache[key] = Future()
                held = self._held.get(key)
                if held is not None:
                    result.set_result(held)
                else:
                    self._jobs.append(_Job(key, grammar, result, time.monotonic()))
                    self._start()
            self._cache.move_to_end(key)
            self._evict()
        return result

    def compiled(self, grammar: Grammar) -> Any:
        """What `submit` gave, held by somebody. Raises KeyError."""
        return self._held[grammar.kind, grammar.text]

    def expire(self) -> None:
        """Fail the grammars that take too long. Call it now and then while one is waited for."""
        now = time.monotonic()
        with self._lock:
            for key, job in list(self._active.items()):
                if now - job.since > COMPILE_SECONDS:
                    del self._active[key]
                    self._num_overdue += 1
                    message = f"{job.grammar.kind}: takes longer than {COMPILE_SECONDS:g} s to compile"
                    self._finish(job, GrammarError(message))
            self._start()
            while self._jobs and now - self._jobs[0].since > WAIT_SECONDS:
                job = self._jobs.popleft()
                self._cache.pop(job.key, None)
                self._finish(job, GrammarError("too many grammars are being compiled; try again later", 503))

    def _start(self) -> None:
        while self._jobs and len(self._active) < MAX_THREADS and self._num_overdue < MAX_OVERDUE:
            job = self._jobs.popleft()._replace(since=time.monotonic())
            self._active[job.key] = job
            # A daemon: the process must be able to end while xgrammar is at it.
            threading.Thread(target=self._run, args=(job,), name="grammar-compiler", daemon=True).start()

    def _run(self, job: _Job) -> None:
        outcome: Any
        started = time.perf_counter()
        try:
            outcome = self._compile(job.grammar)
        except GrammarError as error:
            outcome = error
        except Exception as error:  # whatever it is, it ends this request and not the engine
            outcome = GrammarError(f"{job.grammar.kind}: {type(error).__name__}: {error}")
        with self._lock:
            self.compile_seconds += time.perf_counter() - started
            if self._active.pop(job.key, None) is None:
                self._num_overdue -= 1
            else:
                self._finish(job, outcome)
            self._start()

    def _compile(self, grammar: Grammar) -> Any:
        with self._reader_lock:
            if self._reader is None:
                self._reader = GrammarReader(self._load_vocabulary(), max_threads=max(1, (os.cpu_count() or 1) // 4))
        compiled = self._reader.compile(grammar)
        self._try_first_mask(compiled, grammar.kind)
        return compiled

    def _try_first_mask(self, compiled: Any, kind: str) -> None:
        xgrammar = load_xgrammar()
        mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        started = time.perf_counter()
        constrains = xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        if time.perf_counter() - started > SLOW_MASK_SECONDS:
            raise GrammarError(f"{kind}: too ambiguous: the mask of one token takes over {SLOW_MASK_SECONDS:g} s")
        if constrains and not mask.any():
            raise GrammarError(f"{kind}: no text matches it")

    def _finish(self, job: _Job, outcome: Any) -> None:
        if isinstance(outcome, GrammarError):
            self.num_failed += 1
            job.result.set_exception(outcome)
        else:
            self.num_compiled += 1
            self._held[job.key] = outcome
            job.result.set_result(outcome)

    def _evict(self) -> None:
        """Forget those longest unused; what is being compiled stays."""
        size = 0
        for count, (key, result) in enumerate(reversed(list(self._cache.items()))):
            if result.done():
                size += len(key[1]) + (0 if result.exception() else result.result().memory_size_bytes)
                if size > CACHE_BYTES or count >= CACHE_ENTRIES:
                    del self._cache[key]
