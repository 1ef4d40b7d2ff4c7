"""JSON that arrives in pieces: passed on as it comes, for as long as it is JSON."""

from __future__ import annotations

import json
from typing import Final

import regex

MAX_DEPTH: Final = 128  # of nested arrays and objects; what reads the arguments later may not bear much more

_SPACE = " \t\r\n"
_PLAIN = regex.compile(r'[^"\\\x00-\x1f]*')
# A surrogate only as one of a pair: half a character cannot be sent as UTF-8.
_ESCAPE = regex.compile(
    r'\\(?:["\\/bfnrt]|u(?:[0-9abcefABCEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_SCALAR_END = regex.compile(r'[\s,:\[\]{}"]')
_SCALAR = regex.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")


class JsonReader:
    """Reads one JSON value (RFC 8259). A raw control character inside a string, the one error that can be mended
    without a guess, is escaped; all else is passed on as it is.

    done     the value is complete
    failed   the next character cannot follow what was read
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []  # the brackets that are open
        self._next = "value"  # what may follow: value, key, ":" or ","; "first ..." may also be the closing bracket
        self._in_string = False

    def push(self, text: str) -> tuple[str, int]:
        """Read on. Returns what is certain, and how many characters of `text` that was; give the rest again, with more.

        The rest, if neither done nor failed, is part of an escape, a number, or a word.
        """
        out: list[str] = []
        at = 0
        while at < len(text) and not self.done and not self.failed:
            end = self._string(text, at, out) if self._in_string else self._token(text, at, out)
            if end == at:
                break
            at = end
        return "".join(out), at

    def _string(self, text: str, at: int, out: list[str]) -> int:
        end: int = _PLAIN.match(text, at).end()
        out.append(text[at:end])
        if end == len(text):
            return end
        char = text[end]
        if char == '"':
            self._in_string = False
            if self._next.endswith("key"):
                self._next = ":"
            else:
                self._value_ended()
        elif char == "\\":
            escape = _ESCAPE.match(text, end, partial=True)
            self.failed = escape is None
            if escape is None or escape.partial:
                return end
            out.append(escape[0])
            return escape.end()
        out.append(char if char in '"' else json.dumps(char)[1:-1])
        return end + 1

    def _token(self, text: str, at: int, out: list[str]) -> int:
        """One character of structure or space, or a whole number or word."""
        char, end, expected = text[at], at + 1, self._next
        if char in _SPACE:
            pass
        elif char == '"' and expected.endswith(("value", "key")):
            self._in_string = True
        elif char in "{[" and expected.endswith("value") and len(self._open) < MAX_DEPTH:
            self._open.append("}" if char == "{" else "]")
            self._next = "first key" if char == "{" else "first value"
        elif char in "}]" and self._open[-1:] == [char] and (expected == "," or expected.startswith("first")):
            self._open.pop()
            self._value_ended()
        elif char == expected == ",":
            self._next = "key" if self._open[-1] == "}" else "value"
        elif char == expected == ":":
            self._next = "value"
        elif expected.endswith("value"):
            stop = _SCALAR_END.search(text, at)
            scalar = _SCALAR.fullmatch(text, at, stop.start() if stop else len(text), partial=stop is None)
            self.failed = scalar is None
            if scalar is None or stop is None:
                return at
            end = stop.start()
            self._value_ended()
        else:
            self.failed, end = True, at
        out.append(text[at:end])
        return end

    def _value_ended(self) -> None:
        self._next = ","
        self.done = not self._open


def json_value(text: str) -> str:
    """`text` as a JSON value: as it is (without the space around it) if it is one, else as a JSON string."""
    reader = JsonReader()
    value, end = reader.push(text.strip(_SPACE) + " ")
    if reader.done and end >= len(text.strip(_SPACE)):
        return value
    return json.dumps(text, ensure_ascii=False)


def begun_json_value(text: str) -> str:
    """The beginning of a value that was cut: as JSON, or as a string that is left open if it is none."""
    reader = JsonReader()
    value, end = reader.push(text)
    if reader.failed or (reader.done and text[end:].strip(_SPACE)):
        return json.dumps(text, ensure_ascii=False)[:-1]
    return (value + text[end:]).lstrip(_SPACE)
