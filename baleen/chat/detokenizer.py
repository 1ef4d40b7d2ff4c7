"""Ids -> text as they arrive: whole characters only, special tokens left out, cut at the first stop."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import regex  # unlike re, it can say whether more text could make a match, and stop after a time

from baleen.chat.tokenizer import Tokenizer

MAX_REGEX_CHARS: Final = 256  # looking for the beginning of a long literal in a short text takes its length cubed
SEARCH_SECONDS: Final = 0.1  # that one search of a stop_regex may take; usual ones take microseconds

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StopRegexTimeout(ValueError):
    """A stop_regex takes too long on this text: its request ends, so that the others go on."""


@functools.lru_cache(maxsize=256)
def compile_stop_regex(source: str) -> regex.Pattern[str]:
    """Raises ValueError for what is no regular expression of Python's `re`, or too long a one."""
    if len(source) > MAX_REGEX_CHARS:
        raise ValueError(f"a regular expression of {len(source)} characters is too long; the most is {MAX_REGEX_CHARS}")
    try:
        re.compile(source)
        return regex.compile(source)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{source!r} is not a regular expression: {error}") from error


class StopMatcher:
    """Cuts a text that comes in pieces, one a token, at the first stop.

    stop        strings: the one that is complete first; of two that end together, the longer
    stop_regex  searched after each piece, in order, if no string has matched: `$` is the end of the text so far
    trim        the text ends before the match; else after it

    matched     the string, or the source of the regex, that matched

    Neither rule needs more text than is there. What a string or regex may still match is withheld.
    """

    def __init__(self, stop: Sequence[str], stop_regex: Sequence[str] = (), *, trim: bool = True) -> None:
        self.matched: str | None = None
        self._stop = tuple(s for s in stop if s)
        self._first_chars = frozenset(s[0] for s in self._stop)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._patterns = [compile_stop_regex(source) for source in stop_regex]
        self._trim = trim
        self._text = ""  # all that a match may still need: with patterns the whole text, for the sake of `^` and `(?<=`
        self._given = 0  # characters of it that were returned: no match begins in them

    def push(self, text: str) -> str:
        """Add a piece; return what is now certain to come before any stop. Raises StopRegexTimeout."""
        if self.matched is not None:
            return ""
        if not self._stop and not self._patterns:
            return text
        self._text += text
        span = self._find_string() or self._find_regex()
        if span is not None:
            return self._text[self._given : span[0] if self._trim else span[1]]
        return self._give(min(self._string_may_begin(), self._regex_may_begin()))

    def finish(self) -> str:
        """The rest, when no more text comes."""
        return "" if self.matched is not None else self._give(len(self._text))

    def _give(self, end: int) -> str:
        text = self._text[self._given : end]
        self._given = end
        if not self._patterns:
            self._text, self._given = self._text[end:], 0
        return text

    def _find_string(self) -> tuple[int, int] | None:
        found = [(at + len(s), -len(s), s) for s in self._stop if (at := self._text.find(s, self._given)) >= 0]
        if not found:
            return None
        end, _, self.matched = min(found)
        return end - len(self.matched), end

    def _find_regex(self) -> tuple[int, int] | None:
        for pattern in self._patterns:
            match = self._search(pattern, partial=False)
            if match is not None:
                self.matched = pattern.pattern
                return match.span()
        return None

    def _string_may_begin(self) -> int:
        """Where the first stop string may begin that needs more text; else the end."""
        text, stop = self._text, self._stop
        for at in range(max(self._given, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first_chars and any(s.startswith(text[at:]) for s in stop):
                return at
        return len(text)

    def _regex_may_begin(self) -> int:
        partial = [self._search(pattern, partial=True) for pattern in self._patterns]
        return min((match.start() for match in partial if match is not None), default=len(self._text))

    def _search(self, pattern: regex.Pattern[str], *, partial: bool) -> regex.Match[str] | None:
        try:
            return pattern.search(self._text, self._given, partial=partial, timeout=SEARCH_SECONDS)
        except TimeoutError:
            message = f"{pattern.pattern!r} takes more than {SEARCH_SECONDS} s to search the answer; simplify it"
            raise StopRegexTimeout(message) from None


class Detokenizer:
    """The text of one sequence.

    skip_special_tokens  special tokens are no text, but for the ids in `shown`
    no_stop_trim         a stop string, or what a stop_regex matched, stays in the text

    matched      the stop string that ended the text, or the source of the stop_regex, if one did; whoever reads it then
                 aborts the request
    num_tokens   tokens read, up to and including the one that completed the stop
    num_chars    characters decoded so far, withheld ones included: where the next token's text will begin

    Raises ValueError for a stop_regex that is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        shown: Collection[int] = frozenset(),
        stop_regex: Sequence[str] = (),
        no_stop_trim: bool = False,
    ) -> None:
        self.num_tokens = 0
        self.num_chars = 0
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids.difference(shown) if skip_special_tokens else frozenset()
        self._utf8 = _Utf8Decoder("replace")
        self._stop = StopMatcher(stop, stop_regex, trim=not no_stop_trim)

    @property
    def matched(self) -> str | None:
        return self._stop.matched

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; return the text that is certain by now. After a match nothing is read and nothing returned.

        Raises StopRegexTimeout.
        """
        out = ""
        for token_id in token_ids:
            if self._stop.matched is not None:
                break
            self.num_tokens += 1
            if token_id not in self._skip:
                out += self._add(self._utf8.decode(self._token_bytes(token_id)))
        return out

    def finish(self) -> str:
        """No more tokens come: an incomplete character becomes U+FFFD, and what was withheld for a stop is text."""
        if self._stop.matched is not None:
            return ""
        return self._add(self._utf8.decode(b"", final=True)) + self._stop.finish()

    def _add(self, text: str) -> str:
        self.num_chars += len(text)
        return self._stop.push(text) if text else ""
