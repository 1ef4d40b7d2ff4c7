"""The output parser against what it must agree with: the table in docs/output_parsing.md, xgrammar's grammar of the
format, the encoder that writes calls into the next prompt, and the published golden conversation.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string

from baleen.chat.conversation import Conversation
from baleen.chat.encoding import encode
from baleen.chat.output_parser import Content, Event, OutputParser, Reasoning, ToolArguments, ToolCall

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "output_parsing.md"
GOLDEN = pathlib.Path(__file__).parent.parent.parent / "shared/data/deepseek-v3.2-encoding/test_output.txt"
DSML = "｜DSML｜"


def parse(chunks: Iterable[str], tool_parser: str, thinking: bool = False, functions: str = "f g") -> list[str]:
    """The events, neighbours joined, in the words of the table."""
    parser = OutputParser(tool_parser=tool_parser, in_reasoning=thinking, functions=functions.split())  # type: ignore[arg-type]
    events: list[Event] = [event for chunk in chunks for event in parser.push(chunk)]
    words: list[str] = []
    before: type = type(None)
    for event in events + parser.finish():
        match event:
            case ToolCall(_, name):
                words.append(f"{name} ")
            case ToolArguments(_, text):
                words[-1] += text
            case Content(text) | Reasoning(text):
                if type(event) is not before:
                    words.append(f"{type(event).__name__.lower()} ")
                words[-1] += text
        before = type(event)
    return words


def table() -> list[tuple[str, str, str, list[str]]]:
    """(tool parser, case, output, expected)"""
    rows, tool_parser = [], ""
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            tool_parser = line[4:]
        elif line.startswith("| ") and not line.startswith("| case"):
            line = line.replace("⏎", "\n").replace("<:", f"<{DSML}").replace("</:", f"</{DSML}")
            case, output, result = line.strip("| ").split(" | ")
            rows.append((tool_parser, case, output[1:-1], re.findall("`([^`]*)`", result)))
    return rows


@pytest.mark.parametrize(
    ("tool_parser", "output", "expected"),
    [pytest.param(*row[:1], *row[2:], id=f"{row[0]}: {row[1]}") for row in table()],
)
def test_documented_outcome(tool_parser: str, output: str, expected: list[str]) -> None:
    thinking = output.startswith("THINK ")
    output = output.removeprefix("THINK ")
    for cut in range(len(output) + 1):
        assert parse([output[:cut], output[cut:]], tool_parser, thinking) == expected
    assert parse(output, tool_parser, thinking) == expected
    if not thinking:
        assert parse(output, tool_parser, functions="") == [f"content {output}"]  # no functions, no calls


def test_table_is_read() -> None:
    rows = table()
    assert len(rows) >= 45
    assert {row[0] for row in rows} == {"deepseekv32", "deepseekv31"}


# ---- xgrammar


PROPERTIES = {"a": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"}}


def tool(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}


def grammar(model: str, tool_choice: str) -> xgrammar.Grammar:
    tools = [tool("f"), tool("g")]
    tag = xgrammar.get_model_structural_tag(model, tools=tools, tool_choice=tool_choice, reasoning=False)
    return xgrammar.Grammar.from_structural_tag(tag)


GRAMMARS = {
    "deepseekv32": grammar("deepseek_v3_2", "required"),
    "deepseekv31": grammar("deepseek_v3_1", "required"),
}
_parameters = st.tuples(
    st.none() | st.text('ab <>/"\\\n世｜', max_size=6).map(lambda text: ("a", "true", text)),
    st.none() | st.integers(-99, 99).map(lambda n: ("n", "false", str(n))),
    st.none() | st.sampled_from(["{}", '{"x": [1, "<"]}']).map(lambda text: ("o", "false", text)),
).map(
    lambda them: "".join(
        f'<{DSML}parameter name="{one[0]}" string="{one[1]}">{one[2]}</{DSML}parameter>\n' for one in them if one
    )
)
_v32 = st.lists(
    st.tuples(st.sampled_from("fg"), _parameters).map(
        lambda call: f'<{DSML}invoke name="{call[0]}">\n{call[1]}</{DSML}invoke>\n'
    ),
    min_size=1,
    max_size=3,
).map(lambda calls: f"\n\n<{DSML}function_calls>\n{''.join(calls)}</{DSML}function_calls>")
_json = st.sampled_from(["{}", '{"a": "x<"}', '{"a": "x", "n": -1, "o": {"y": [true, null]}}'])
_v31 = st.lists(st.tuples(st.sampled_from("fg"), _json), min_size=1, max_size=3).map(
    lambda calls: (
        "<｜tool▁calls▁begin｜>"
        + "".join(f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text}<｜tool▁call▁end｜>" for name, text in calls)
        + "<｜tool▁calls▁end｜>"
    )
)
_edits = st.none() | st.tuples(
    st.floats(0, 1), st.integers(0, 12), st.sampled_from(["", "", "\n", "x", "h", f"</{DSML}invoke>", '"', "<"])
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([("deepseekv32", _v32), ("deepseekv31", _v31)]), _edits, st.data())
def test_what_xgrammar_accepts_is_calls_and_nothing_else(
    one: tuple[str, st.SearchStrategy[str]], edit: tuple[float, int, str] | None, data: st.DataObject
) -> None:
    tool_parser, texts = one
    text = data.draw(texts)
    if edit is not None:
        at = int(edit[0] * len(text))
        text = text[:at] + edit[2] + text[at + edit[1] :]
    accepted = _is_grammar_accept_string(GRAMMARS[tool_parser], text)
    assert accepted or edit is not None
    if accepted:
        words = parse(text, tool_parser)
        assert words
        for word in words:
            assert word[:2] in ("f ", "g ")
            assert isinstance(json.loads(word[2:]), dict)


# ---- the encoder

_text = st.text("ab1 \n<>/\"'\\{}｜世😀", max_size=8)
_value = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | _text | st.lists(_text, max_size=2)
_call = st.tuples(st.sampled_from("fg"), st.dictionaries(st.text("ab世 <", min_size=1, max_size=3), _value, max_size=3))


@settings(max_examples=200, deadline=None)
@given(_text, _text, st.lists(_call, min_size=1, max_size=3))
def test_calls_of_the_next_prompt_are_read_as_they_were_written(
    reasoning: str, content: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    turn = {
        "role": "assistant",
        "reasoning_content": reasoning,
        "content": content,
        "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
            for i, (name, values) in enumerate(calls)
        ],
    }
    results = [{"role": "tool", "tool_call_id": f"call_{i}", "content": "ok"} for i in range(len(calls))]
    prompt = encode(Conversation([{"role": "user", "content": "?"}, turn, *results], thinking=True)).text
    answer = prompt.split("<｜Assistant｜><think>")[1].split("<｜end▁of▁sentence｜>")[0]
    words = parse(answer, "deepseekv32", thinking=True)
    expected = [f"reasoning {reasoning}"] * bool(reasoning) + [f"content {content}"] * bool(content)
    assert words[: -len(calls)] == expected
    assert [(word[0], json.loads(word[2:])) for word in words[-len(calls) :]] == calls


# ---- the golden conversation


@pytest.mark.skipif(not GOLDEN.exists(), reason="the published golden files are not beside the repository")
def test_every_answer_of_the_golden_conversation_is_read() -> None:
    text = GOLDEN.read_text(encoding="utf-8")
    tools, conversation = text.split("</functions>", 1)
    names = " ".join(re.findall(r'^\{"name": "(\w+)"', tools, re.MULTILINE))
    assert names
    turns = re.findall(
        "(<think>|</think>)((?:(?!<think>|<｜User｜>|<function_results>).)*)<｜end▁of▁sentence｜>",
        conversation,
        re.DOTALL,
    )
    assert len(turns) >= 4
    for opening, answer in turns:
        words = parse(answer, "deepseekv32", opening == "<think>", names)
        calls = [word for word in words if word.split(" ")[0] in names.split()]
        assert len(calls) == answer.count(f"<{DSML}invoke")
        for call in calls:
            assert isinstance(json.loads(call.split(" ", 1)[1]), dict)
        assert not any(DSML in word for word in words)
        text_of = "".join(word.split(" ", 1)[1] for word in words if word not in calls)
        before = answer.split(f"\n\n<{DSML}function_calls>")[0]
        assert text_of == (before.replace("</think>", "", 1) if opening == "<think>" else before)
