"""Properties of the parser over generated outputs, well-formed and not. The documented outcomes are tested in
tests/test_output_parsing.py.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.chat.conftest import build_tokenizer
from baleen.chat.detokenizer import Detokenizer
from baleen.chat.output_parser import Content, Event, OutputParser, Reasoning, ToolArguments, ToolCall
from baleen.chat.tokenizer import Tokenizer

Format = Literal["deepseekv32", "deepseekv31"]
TOKENIZER = Tokenizer(build_tokenizer())
BYTE_IDS = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.num_ids) if len(TOKENIZER.token_bytes(i)) == 1}
D = "｜DSML｜"

# ---- outputs: pieces of both formats in any order. A word like w7 occurs once, so that a lost or doubled one shows.

TAGS = [
    "</think>",
    "<think>",
    f"<{D}function_calls>",
    f"</{D}function_calls>",
    f"</{D}function_calls>",
    f'<{D}invoke name="f">',
    f'<{D}invoke name="g">',
    f'<{D}invoke name="f"/>',
    f'<{D}invoke name="unknown">',
    f"</{D}invoke>",
    f"</{D}invoke>",
    f'<{D}parameter name="#" string="true">',
    f'<{D}parameter name="#" string="true">',
    f'<{D}parameter name="#" string="false">',
    f'<{D}parameter name="#">',
    f"</{D}parameter>",
    f"</{D}parameter>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>",
    "<｜tool▁call▁begin｜>unknown<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
]
TEXT = ["#", "#", "\n", "\n", " ", "世#", "😀", "\x00", "é"]
BROKEN = ["<", "</", "<｜", D, "<thi", "name=", ">", '"', "\\", f"<{D}invoke", f"</{D}par", "&lt;"]
JSON = ["{", "}", "[", "]", '{"#": ["#", 1.0, true]}', '{"#": "', '"#"', ": ", ", ", "12", "nul", "\\u00e9", "\\ud800"]


def numbered(pieces: list[str]) -> str:
    """The pieces joined, each # a word of its own."""
    count = iter(range(1000))
    return re.sub("#", lambda _: f"w{next(count)}.", "".join(pieces))


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """`text` with one place cut out, doubled, or filled with something else."""
    at = draw(st.integers(0, len(text)))
    length = draw(st.integers(0, 20))
    new = draw(st.sampled_from(["", *TAGS, *BROKEN])).replace("#", "new")
    return text[:at] + new + text[at + length :]


anything = st.lists(st.sampled_from(TAGS + TAGS + TEXT + BROKEN + JSON), max_size=14).map(numbered)

# ---- well-formed outputs with what they mean

plain = st.text(st.sampled_from("ab1 \n<>/\"'\\{}｜世😀\x00é"), max_size=8)
keys = st.text(st.sampled_from("ab世 <>\\'"), max_size=3)
json_values = st.sampled_from(
    [None, True, 0, -1.5e-7, 10**25, 1.0, [], {}, [1, [2, {}]], {"k<": "v\n"}, ["</", {"x": None, "": '"\\'}]]
)
arguments = st.dictionaries(keys, json_values | plain, max_size=3)
space = st.sampled_from(["", "\n", " \t\r\n\n"])
Call = tuple[str, dict[str, Any]]


@st.composite
def blocks(draw: st.DrawFn, tool_parser: Format) -> tuple[str, list[Call]]:
    """(the text of one block, its calls)"""
    calls = draw(st.lists(st.tuples(st.sampled_from("fg"), arguments), min_size=1, max_size=3))
    if tool_parser == "deepseekv31":
        ascii = draw(st.booleans())
        texts = [
            f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(values, ensure_ascii=ascii)}<｜tool▁call▁end｜>"
            for name, values in calls
        ]
        return "<｜tool▁calls▁begin｜>" + draw(space).join(texts) + "<｜tool▁calls▁end｜>", calls
    text = draw(st.sampled_from(["", "\n\n"])) + f"<{D}function_calls>" + draw(space)
    for name, values in calls:
        text += draw(invokes(name, values)) + draw(space)
    return text + f"</{D}function_calls>", calls


@st.composite
def invokes(draw: st.DrawFn, name: str, values: dict[str, Any]) -> str:
    if not values and draw(st.booleans()):
        return f'<{D}invoke name="{name}"/>'
    text = f'<{D}invoke name="{name}">' + draw(space)
    if draw(st.booleans()) and draw(st.booleans()):
        return text + json.dumps(values) + draw(space) + f"</{D}invoke>"
    for key, value in values.items():
        raw = isinstance(value, str)
        shown = value if raw else draw(space) + json.dumps(value, ensure_ascii=False) + draw(space)
        text += f'<{D}parameter name="{key}" string="{"true" if raw else "false"}">{shown}</{D}parameter>' + draw(space)
    return text + f"</{D}invoke>"


@st.composite
def outputs(draw: st.DrawFn, tool_parser: Format) -> tuple[str, bool, list[Any]]:
    """(output, whether it starts in reasoning, [Reasoning | Content | (name, arguments)])"""
    thinking = draw(st.booleans())
    meaning: list[Any] = []
    text = ""
    if thinking:
        reasoning = draw(plain)
        text += f"{reasoning}</think>"
        meaning += [Reasoning(reasoning)] if reasoning else []
    for _ in range(draw(st.integers(0, 2))):
        between, (block, calls) = draw(plain), draw(blocks(tool_parser))
        if tool_parser == "deepseekv32" and not block.startswith("\n"):
            between = between.rstrip("\n")  # they would be the block's
        text += between + block
        meaning += [Content(between)] if between else []
        meaning += calls
    after = draw(plain)
    return text + after, thinking, meaning + ([Content(after)] if after else [])


# ---- reading


def parse(chunks: list[str], tool_parser: Format | None, thinking: bool) -> list[Event]:
    """The events, neighbours of one kind joined."""
    parser = OutputParser(tool_parser=tool_parser, in_reasoning=thinking, functions=("f", "g"))
    events: list[Any] = [event for chunk in chunks for event in parser.push(chunk)] + parser.finish()
    assert parser.num_calls == sum(isinstance(event, ToolCall) for event in events)
    joined: list[Any] = []
    for event in events:
        assert isinstance(event, ToolCall) or event.text
        if joined and type(joined[-1]) is type(event) and not isinstance(event, ToolCall):
            event = msgspec.structs.replace(event, text=joined.pop().text + event.text)
        joined.append(event)
    return joined


def cut(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


def bytewise(text: str) -> list[str]:
    """The chunks that come when each token is one byte."""
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push([BYTE_IDS[bytes([byte])]]) for byte in text.encode()]
    return [*pieces, detokenizer.finish()]


def check(text: str, events: list[Event]) -> None:
    """What holds of any output: nothing lost or doubled, and events in an order a client can follow."""
    assert re.findall(r"w\d+\.", "".join(getattr(event, "text", "") for event in events)) == re.findall(r"w\d+\.", text)
    num_calls = 0
    before: Event | None = None
    for event in events:
        if isinstance(event, ToolCall):
            assert event.index == num_calls
            assert event.name in ("f", "g")
            num_calls += 1
        if isinstance(event, ToolArguments):
            assert isinstance(before, ToolCall)
            assert event.index == before.index
            try:
                assert isinstance(json.loads(event.text), dict)
            except ValueError:  # cut, or wrong from here on: a client cannot take it for whole
                assert event.text.startswith("{")
        else:
            assert not isinstance(before, ToolCall)  # every call has arguments
        before = event
    if num_calls == 0 and "</think>" not in text:
        assert "".join(getattr(event, "text", "") for event in events) == text


formats: st.SearchStrategy[Format] = st.sampled_from(["deepseekv32", "deepseekv32", "deepseekv31"])


@settings(max_examples=1200, deadline=None)
@given(anything, st.sampled_from(["deepseekv32", "deepseekv31", None]), st.booleans(), st.data())
def test_any_output_any_chunks(text: str, tool_parser: Format | None, thinking: bool, data: st.DataObject) -> None:
    whole = parse([text], tool_parser, thinking)
    check(text, whole)
    assert parse(cut(data, text), tool_parser, thinking) == whole
    assert parse(list(text), tool_parser, thinking) == whole
    assert parse(bytewise(text), tool_parser, thinking) == whole


@settings(max_examples=600, deadline=None)
@given(formats.flatmap(lambda form: st.tuples(st.just(form), outputs(form))), st.data())
def test_well_formed_output_means_what_it_says(
    one: tuple[Format, tuple[str, bool, list[Any]]], data: st.DataObject
) -> None:
    tool_parser, (text, thinking, meaning) = one
    for chunks in ([text], list(text), cut(data, text), bytewise(text)):
        events = parse(chunks, tool_parser, thinking)
        calls = {event.index: json.loads(event.text) for event in events if isinstance(event, ToolArguments)}
        read = [
            (event.name, calls[event.index]) if isinstance(event, ToolCall) else event
            for event in events
            if not isinstance(event, ToolArguments)
        ]
        assert read == meaning


@settings(max_examples=500, deadline=None)
@given(formats.flatmap(lambda form: st.tuples(st.just(form), outputs(form))), st.data())
def test_output_with_an_error(one: tuple[Format, tuple[str, bool, list[Any]]], data: st.DataObject) -> None:
    tool_parser, (text, thinking, _) = one
    text = data.draw(mutated(text))
    whole = parse([text], tool_parser, thinking)
    check(text, whole)
    assert parse(list(text), tool_parser, thinking) == whole
    assert parse(cut(data, text), tool_parser, thinking) == whole


# ---- what is sent when


def pushes(chunks: list[str], **options: Any) -> list[list[Event]]:
    parser = OutputParser(**({"tool_parser": "deepseekv32", "in_reasoning": False, "functions": ("f",)} | options))
    return [parser.push(chunk) for chunk in chunks]


def test_text_is_withheld_only_while_it_may_be_a_tag() -> None:
    assert pushes(["a", " <", "b>", "\n", "\n", "\n", "c", "<｜", "x"]) == [
        [Content("a")],
        [Content(" ")],
        [Content("<b>")],
        [],
        [],
        [Content("\n")],
        [Content("\n\nc")],
        [],
        [Content("<｜x")],
    ]
    assert pushes(["abc</th", "e end", "</think>x\n", "</th"], tool_parser=None, in_reasoning=True) == [
        [Reasoning("abc")],
        [Reasoning("</the end")],
        [Content("x\n")],
        [Content("</th")],
    ]


def test_a_string_argument_streams() -> None:
    header = f'<{D}function_calls>\n<{D}invoke name="f">\n<{D}parameter name="a" string="true">'
    assert pushes([header, "one ", "two\n", "<three", f"</{D}", "parameter>", f"\n</{D}invoke>"]) == [
        [ToolCall(0, "f"), ToolArguments(0, '{"a": "')],
        [ToolArguments(0, "one ")],
        [ToolArguments(0, "two\\n")],
        [ToolArguments(0, "<three")],
        [],
        [ToolArguments(0, '"')],
        [ToolArguments(0, "}")],
    ]


def test_json_arguments_stream() -> None:
    header = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
    assert pushes([header, "{", '"a": "x', "y\\", 'n", "b": 1', "2}"], tool_parser="deepseekv31") == [
        [],
        [ToolCall(0, "f"), ToolArguments(0, "{")],
        [ToolArguments(0, '"a": "x')],
        [ToolArguments(0, "y")],
        [ToolArguments(0, '\\n", "b": ')],
        [ToolArguments(0, "12}")],
    ]


def test_in_reasoning_and_num_calls_follow_the_text() -> None:
    parser = OutputParser(tool_parser="deepseekv32", in_reasoning=True, functions=["f"])
    assert parser.push("x</think") == [Reasoning("x")]
    assert parser.in_reasoning
    assert parser.push(">") == []
    assert not parser.in_reasoning
    assert parser.num_calls == 0
    parser.push(f'<{D}invoke name="f"/>')
    assert parser.num_calls == 1


@pytest.mark.parametrize("piece", ["<", f"<{D}function_calls>", f'<{D}invoke name="f">', "\n", " ", "[", '{"a": '])
def test_long_repetition_is_cheap(piece: str) -> None:
    """One by one, without a look at the whole text for each."""
    for opening in (
        "",
        f'<{D}invoke name="f">',
        f'<{D}invoke name="f">{{"a": ',
        f'<{D}invoke name="f"><{D}parameter name="a">',
    ):
        events = pushes([opening] + [piece] * 5000)
        assert len(events) == 5001
