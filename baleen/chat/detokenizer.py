"""Ids -> text as they arrive: whole characters only, special tokens left out, cut at the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from baleen.chat.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StopMatcher:
    """Cuts a text that comes in pieces at the stop string that is complete first; of two that end together, the longer.

    This rule needs no look-ahead past a complete stop string, and gives the same cut however the text is chunked.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stop = tuple(s for s in stop if s)
        self._first_chars = frozenset(s[0] for s in self._stop)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._held = ""  # the end of the text so far that may be the start of a stop string; never a whole one

    def push(self, text: str) -> str:
        """Add text; return what is now certain to come before any stop string."""
        if not self._stop or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        self._held = ""
        found = [(at + len(s), -len(s), s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end, _, self.matched = min(found)
            return text[: end - len(self.matched)]
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first_chars and any(s.startswith(text[at:]) for s in self._stop):
                self._held = text[at:]
                return text[:at]
        return text

    def finish(self) -> str:
        """The rest, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


class Detokenizer:
    """The text of one sequence.

    matched      the stop string that ended the text, if one did; whoever reads it then aborts the request
    num_tokens   tokens read, up to and including the one that completed the stop string
    num_chars    characters decoded so far, withheld ones included: where the next token's text will begin
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self.num_tokens = 0
        self.num_chars = 0
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = _Utf8Decoder("replace")
        self._stop = StopMatcher(stop)

    @property
    def matched(self) -> str | None:
        return self._stop.matched

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; return the text that is certain by now. After a match nothing is read and nothing returned."""
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
