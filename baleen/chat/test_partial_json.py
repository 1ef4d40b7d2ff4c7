"""What the reader accepts is what Python's json accepts, however the text is chunked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.chat.partial_json import MAX_DEPTH, JsonReader, begun_json_value, json_value

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
layouts = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
near_json = st.lists(
    st.sampled_from(
        [
            *'{}[],:"\\-0 \nx\x01é',
            '"a"',
            "\\n",
            "\\u0041",
            "\\ud83d\\ude00",
            "\\ud83d",
            "\\x",
            "1",
            ".5",
            "e+3",
            "true",
            "null",
        ]
    ),
    max_size=10,
).map("".join)


def read(chunks: list[str]) -> tuple[str, str, JsonReader]:
    """(what was passed on, what was left, the reader)"""
    reader, out, rest = JsonReader(), "", ""
    for chunk in chunks:
        rest += chunk
        text, end = reader.push(rest)
        out, rest = out + text, rest[end:]
    return out, rest, reader


def refuse(name: str) -> None:
    raise ValueError(name)


def parse(text: str) -> Any:
    """Python's reading, with what the reader allows (control characters in strings) and what it refuses (NaN, half
    characters). Raises ValueError.
    """
    value = json.loads(text, strict=False, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()
    return value


@settings(max_examples=300, deadline=None)
@given(values, layouts)
def test_json_passes_unchanged(value: Any, layout: dict[str, Any]) -> None:
    text = json.dumps([value], **layout)
    for chunks in ([text], list(text)):
        out, rest, reader = read(chunks)
        assert (out, rest, reader.done, reader.failed) == (text, "", True, False)
    assert json_value(f" \n{text} ") == text


@settings(max_examples=600, deadline=None)
@given(near_json, st.data())
def test_accepts_what_json_accepts(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    out, rest, reader = read([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])])
    whole_out, whole_rest, whole = read([text])
    assert (out, rest, reader.done, reader.failed) == (whole_out, whole_rest, whole.done, whole.failed)
    try:
        expected = parse(text)
    except ValueError:
        assert json.loads(json_value(text)) == text  # no JSON: a string
    else:
        assert parse(json_value(text)) == expected
    if whole.failed:
        for more in ("", '"', "}", "]", "1", " "):  # no text can follow that makes it JSON
            with pytest.raises(ValueError):
                parse(text + more)


@pytest.mark.parametrize(
    ("text", "begun"),
    [
        ("[1, 2", "[1, 2"),
        (" 12", "12"),
        ("tru", "tru"),
        ('{"a": "x\n', '{"a": "x\\n'),
        ("Tok", '"Tok'),
        ("1 2", '"1 2'),
        ("12 ", "12 "),
        ("", ""),
    ],
)
def test_a_value_that_was_cut(text: str, begun: str) -> None:
    assert begun_json_value(text) == begun


def test_depth_is_limited() -> None:
    assert json_value("[" * MAX_DEPTH + "]" * MAX_DEPTH).startswith("[[")
    assert json_value("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)).startswith('"[')
