"""Regular expressions for xgrammar 0.2.8, which matches the whole text, drops anchors inside a pattern and lookaheads
inside a schema, and lets a dot match a line break.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ASSERTIONS = {
    "(?=": "a lookahead", "(?!": "a lookahead", "(?<=": "a lookbehind", "(?<!": "a lookbehind", "\\b": "\\b",
    "\\B": "\\B", "\\A": "\\A (write ^)", "\\Z": "\\Z (write $)", "\\z": "\\z (write $)",
}  # fmt: skip
_NO_BREAK = "[^\\n\\r]"
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|c.|.|$)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f]|\\[nrtfv0c]|\\x[01]|\\u00[01]|\\u\{0*1?.\}")


class PatternError(ValueError):
    """The message says what and where."""


def whole(pattern: str) -> str:
    """The pattern for a text that matches it from end to end; anchors say nothing then. Raises PatternError."""
    return "|".join("".join(pieces) for pieces, _, _ in _alternatives(pattern, _NO_BREAK))


def anywhere(pattern: str) -> str:
    """The pattern for a JSON string in which it is found: what `pattern` in a schema means. Raises PatternError.

    No character of the string is escaped then, so there are no quotes, backslashes and line breaks in it.
    """
    for at, piece in _pieces(pattern):
        if not piece.startswith("[^") and _CONTROL.search(piece):  # xgrammar would write it bare, which is no JSON
            raise PatternError(f"the line break or control character at position {at + 1} cannot be enforced")
    found = []
    for pieces, at_start, at_end in _alternatives(pattern, "."):
        before, after = "" if at_start else ".*", "" if at_end else ".*"
        found.append(f"{before}({''.join(pieces)}){after}")
    return "|".join(found)


def _alternatives(pattern: str, dot: str) -> Iterator[tuple[list[str], bool, bool]]:
    """The alternatives at the top: without their anchors, and whether they had ^ and $."""
    pieces: list[str] = []
    depth, at_start, at_end = 0, False, False
    for at, piece in _pieces(pattern):
        if piece == "|" and depth == 0:
            yield pieces, at_start, at_end
            pieces, at_start, at_end = [], False, False
            continue
        if at_end and piece != "$":
            raise PatternError(f"`$` before position {at + 1} cannot be enforced; it may only end the pattern")
        if piece == "^":
            if depth or pieces:
                raise PatternError(f"`^` at position {at + 1} cannot be enforced; it may only begin the pattern")
            at_start = True
        elif piece == "$":
            if depth:
                raise PatternError(f"`$` at position {at + 1} cannot be enforced; it may only end the pattern")
            at_end = True
        else:
            depth += (piece == "(") - (piece == ")")
            pieces.append(dot if piece == "." else piece)
    yield pieces, at_start, at_end


def _pieces(pattern: str) -> Iterator[tuple[int, str]]:
    """Escapes and character classes whole, else single characters, each with its position. Raises PatternError."""
    at = 0
    while at < len(pattern):
        for mark, name in _ASSERTIONS.items():
            if pattern.startswith(mark, at):
                raise PatternError(f"{name} at position {at + 1} cannot be enforced")
        end = at + 1
        escape = _ESCAPE.match(pattern, at)
        if escape:
            end = escape.end()
        elif pattern[at] == "[":
            end += pattern.startswith("^", end)
            while end < len(pattern) and pattern[end] != "]":
                end += 2 if pattern[end] == "\\" else 1
            end += 1
        yield at, pattern[at:end]
        at = end
