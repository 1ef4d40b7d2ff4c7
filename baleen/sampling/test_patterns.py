"""Python's `re` is the oracle: a text of the grammar is a match, and these matches are texts of the grammar."""

from __future__ import annotations

import json
import re

import pytest

from baleen.sampling.conftest import Compile, is_text_of
from baleen.sampling.patterns import PatternError, anywhere, whole

TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "ba",
    "aab",
    "xay",
    "a|b",
    "a.b",
    "a]b",
    "abc",
    "https://x",
    "12-ab",
    "(a)",
    "^a",
    "a$",
    "A",
]
PATTERNS = [
    "a", "a|b", "^a", "b$", "^a$", "^a|b$", "^a$|^b$", "", "^$", "^(a|b)+$", "a.b", r"a\.b", r"^a\|b$", "[a|b]$",
    r"^[^\]]+$", r"[\]]", "^https://", r"^\d{2}-\w+$", "(?:a|b)c", r"^\(a\)$", r"^\^a$", r"\$$", "^a+?b$", "[$^]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_of_a_schema_is_searched_for(compiled: Compile, pattern: str) -> None:
    grammar = compiled("json_schema", json.dumps({"type": "string", "pattern": pattern}))
    for text in TEXTS:
        assert is_text_of(grammar, json.dumps(text)) == (re.search(pattern, text) is not None), text


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern not in ("", "^$")])
def test_a_regex_is_the_whole_text(compiled: Compile, pattern: str) -> None:
    grammar = compiled("regex", pattern)
    for text in TEXTS:
        assert is_text_of(grammar, text) == (re.fullmatch(pattern, text) is not None), text


def test_a_dot_is_no_line_break(compiled: Compile) -> None:
    grammar = compiled("regex", r"a.*b\.")
    assert is_text_of(grammar, "a日b.")
    assert not is_text_of(grammar, "a\nb.")
    assert not is_text_of(grammar, "abx")


@pytest.mark.parametrize(
    "pattern", ["a\n", r"a\n", r"a[\t-z]", "a[\x01]", r"a\x0a", r"a\u000a", r"a\cJ", r"a\0", r"a\u{a}"]
)
def test_a_json_string_has_no_bare_control_characters(compiled: Compile, pattern: str) -> None:
    with pytest.raises(PatternError, match="control character at position 2 "):
        anywhere(pattern)
    whole(pattern)
    for harmless in (r"^[^\n\t]$", r"\s", r"\W", "[\\s\\S]", r"^.$"):
        grammar = compiled("json_schema", json.dumps({"type": "string", "pattern": harmless}))
        assert not any(is_text_of(grammar, f'"{chr(code)}"') for code in range(32))


@pytest.mark.parametrize(
    ("pattern", "position"),
    [
        ("(?=a)b", 1), ("ab(?!c)", 3), ("(?<=a)b", 1), ("(?<!a)b", 1), (r"\bfoo", 1), (r"foo\B", 4), (r"a\Z", 2),
        (r"\Aa", 1), ("a^b", 2), ("(^a)", 2), ("a$b", 3), ("(a$)", 3), ("a$$b", 4),
    ],
)  # fmt: skip
def test_what_xgrammar_would_drop_is_refused(pattern: str, position: int) -> None:
    for write in (whole, anywhere):
        with pytest.raises(PatternError, match=f"position {position} "):
            write(pattern)
