"""Which ids each kind of grammar lets through, what the formats of tool calls look like, and what errors say."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import xgrammar

from baleen.chat.conftest import real_tokenizer  # noqa: F401  a fixture
from baleen.chat.output_parser import Content, OutputParser, ToolArguments, ToolCall
from baleen.chat.tokenizer import Tokenizer
from baleen.messages import Grammar
from baleen.sampling import grammar_text
from baleen.sampling.conftest import EOS, MARKS, Compile, allowed, byte_vocabulary, is_text_of
from baleen.sampling.grammar_text import GrammarError, GrammarReader, Vocabulary

DSML = 259
GET = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "x",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
            "required": ["city"],
        },
    },
}
NOTHING = {"type": "function", "function": {"name": "now"}}
CITY = '<｜DSML｜parameter name="city" string="true">Ulm "x" <b>\n</｜DSML｜parameter>\n'
DAYS = '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
GET_CALL = f'<｜DSML｜invoke name="get_weather">\n{CITY}{DAYS}</｜DSML｜invoke>\n'
NOW_CALL = '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'


def block(*calls: str) -> str:
    """As the V3.2 prompt format writes calls."""
    return f"\n\n<｜DSML｜function_calls>\n{''.join(calls)}</｜DSML｜function_calls>"


def block31(*calls: tuple[str, str]) -> str:
    parts = (f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text}<｜tool▁call▁end｜>" for name, text in calls)
    return f"<｜tool▁calls▁begin｜>{''.join(parts)}<｜tool▁calls▁end｜>"


def tools(
    choice: Any, *, parallel: bool = True, call_format: str = "deepseekv32", offered: tuple[Any, ...] = (GET, NOTHING)
) -> str:
    return json.dumps({"format": call_format, "tools": offered, "tool_choice": choice, "parallel_tool_calls": parallel})


# ---- marks ----------------------------------------------------------------------------------------------------------


def test_a_mark_is_no_text(compiled: Compile) -> None:
    """The bytes of eos or `<think>` inside a JSON string are spelled by other ids, never by the mark's own."""
    matcher = xgrammar.GrammarMatcher(compiled("json_schema", '{"type": "string"}'))
    assert matcher.accept_string('"a<think')
    assert not allowed(matcher) & set(MARKS)
    assert ord(">") + 3 in allowed(matcher)
    for mark in MARKS:
        assert not matcher.accept_token(mark)
    assert matcher.accept_string('>"')
    assert allowed(matcher) == {EOS}


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"enum": ["<think>", "｜DSML｜"]}, {"pattern": "<think>"}])
def test_no_mark_begins_or_follows_anything_in_a_json_schema(compiled: Compile, schema: Any) -> None:
    matcher = xgrammar.GrammarMatcher(compiled("json_schema", json.dumps(schema)))
    text = '"<think>"' if schema.get("enum") or schema.get("pattern") else '{"a": "b", "c": [1]}'
    for char in text:
        assert not allowed(matcher) & set(MARKS)
        assert matcher.accept_string(char)
    assert allowed(matcher) & set(MARKS) == {EOS}


def test_a_mark_that_the_grammar_spells_is_usable(compiled: Compile) -> None:
    for kind, text in [("regex", "<think>a"), ("ebnf", 'root ::= "<think>" "a"'), ("structural_tag", tag("<think>"))]:
        matcher = xgrammar.GrammarMatcher(compiled(kind, text))  # type: ignore[arg-type]
        assert 260 in allowed(matcher), kind
        assert allowed(matcher) & set(MARKS) == {260}, kind
        assert matcher.accept_token(260)
        assert matcher.accept_string("a")


def tag(begin: str) -> str:
    schema = {"type": "json_schema", "json_schema": {"type": "integer"}}
    content = {"type": "or", "elements": [schema, {"type": "const_string", "value": "a"}]}
    return json.dumps(
        {"type": "structural_tag", "format": {"type": "tag", "begin": begin, "content": content, "end": ""}}
    )


def test_the_real_vocabulary(real_tokenizer: Tokenizer) -> None:  # noqa: F811
    """129,280 rows: V3.2's marks, the 465 rows without a token, and the tokens that tool calls are written with."""
    size = 129280
    tokens = [real_tokenizer.token_bytes(i) for i in range(size)]
    reader = GrammarReader(Vocabulary(tokens, real_tokenizer.added_ids, [1]))
    marks = set(real_tokenizer.added_ids)
    assert {0, 1, 2, 128793, 128798, 128799, 128803, 128806, 128805} <= marks
    forbidden = marks | set(range(real_tokenizer.num_ids, size))
    matcher = xgrammar.GrammarMatcher(reader.compile(Grammar(kind="json_schema", text='{"type": "string"}')))
    assert matcher.accept_string('"a')
    assert not allowed(matcher, size) & forbidden
    assert len(allowed(matcher, size)) > 120_000
    assert matcher.accept_string('"')
    assert allowed(matcher, size) == {1}

    matcher = xgrammar.GrammarMatcher(reader.compile(Grammar(kind="tools", text=tools("required"))))
    ids = real_tokenizer.encode(block(GET_CALL, NOW_CALL))
    assert ids.count(128793) == 10
    for token_id in ids:
        assert token_id in allowed(matcher, size)
        assert allowed(matcher, size) & forbidden <= {128793}
        assert matcher.accept_token(token_id)
    assert allowed(matcher, size) == {1}

    grammar = Grammar(kind="tools", text=tools("required", call_format="deepseekv31"))
    matcher = xgrammar.GrammarMatcher(reader.compile(grammar))
    for token_id in real_tokenizer.encode(block31(("get_weather", '{"city": "Ulm"}'), ("now", "{}"))):
        assert matcher.accept_token(token_id)
    assert allowed(matcher, size) == {1}


# ---- tool calls -----------------------------------------------------------------------------------------------------


def parsed(text: str, call_format: Any = "deepseekv32") -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls, by the parser that the server has."""
    parser = OutputParser(tool_parser=call_format, in_reasoning=False, functions={"get_weather", "now"})
    content, calls = "", []
    for event in parser.push(text) + parser.finish():
        match event:
            case Content(text=more):
                content += more
            case ToolCall(name=name):
                calls.append([name, ""])
            case ToolArguments(index=index, text=more):
                calls[index][1] += more
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def test_required_calls_are_as_the_prompt_format_writes_them(compiled: Compile) -> None:
    grammar = compiled("tools", tools("required"))
    assert is_text_of(grammar, block(GET_CALL))
    assert is_text_of(grammar, block(GET_CALL, NOW_CALL, GET_CALL))
    assert parsed(block(GET_CALL, NOW_CALL)) == (
        "",
        [("get_weather", {"city": 'Ulm "x" <b>\n', "days": 3}), ("now", {})],
    )
    for wrong in (
        "hello",
        "",
        block(),
        block(GET_CALL) + "more",
        "x" + block(GET_CALL),
        block(GET_CALL).strip("\n"),
        block(GET_CALL.replace("get_weather", "other")),
        block(GET_CALL.replace(CITY, "")),
        block(GET_CALL.replace(">3<", '>"3"<')),
        block(GET_CALL.replace('"days"', '"hours"')),
    ):
        assert not is_text_of(grammar, wrong), wrong


def test_parallel_false_is_one_call(compiled: Compile) -> None:
    for choice in ("required", "auto"):
        grammar = compiled("tools", tools(choice, parallel=False))
        assert is_text_of(grammar, block(GET_CALL))
        assert not is_text_of(grammar, block(GET_CALL, NOW_CALL))
        assert not is_text_of(grammar, block(NOW_CALL) + block(NOW_CALL))


def test_a_named_tool_is_the_only_one(compiled: Compile) -> None:
    grammar = compiled("tools", tools({"type": "function", "function": {"name": "now"}}))
    assert is_text_of(grammar, block(NOW_CALL))
    assert not is_text_of(grammar, block(GET_CALL))
    assert not is_text_of(grammar, block(NOW_CALL, GET_CALL))


def test_auto_is_text_or_calls_and_ends_with_them(compiled: Compile) -> None:
    grammar = compiled("tools", tools("auto"))
    for text in ("", "hello <b>", "hello" + block(GET_CALL, NOW_CALL), "<｜DSML｜ is a mark"):
        assert is_text_of(grammar, text), text
    for text in (
        "hello" + block(GET_CALL) + "and more",
        block(GET_CALL) + block(NOW_CALL),
        "hello" + block(GET_CALL.replace("get_weather", "other")),
        GET_CALL,  # without its wrapper it would pass by all rules
        "a <think> b",
    ):
        assert not is_text_of(grammar, text), text
    matcher = xgrammar.GrammarMatcher(grammar)
    assert allowed(matcher) & set(MARKS) == {EOS, DSML}


@pytest.mark.parametrize("call_format", ["deepseekv32", "deepseekv31"])
def test_calls_or_a_json_answer(compiled: Compile, call_format: str) -> None:
    """response_format beside tools: the model calls, or answers in the schema."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = json.loads(tools("auto", call_format=call_format)) | {"answer_schema": schema}
    grammar = compiled("tools", json.dumps(asked))
    calls = block(GET_CALL, NOW_CALL) if call_format == "deepseekv32" else block31(("get_weather", '{"city": "Ulm"}'))
    assert is_text_of(grammar, calls)
    assert is_text_of(grammar, '{"n": 3}')
    for wrong in ("", "hello", '{"n": "3"}', '{"n": 3}' + calls, "so" + calls, calls + '{"n": 3}'):
        assert not is_text_of(grammar, wrong), wrong
    with pytest.raises(GrammarError, match="/response_format/properties/n"):
        compiled("tools", json.dumps(asked | {"answer_schema": {"properties": {"n": {"type": "nope"}}}}))


def test_deepseekv31(compiled: Compile) -> None:
    good = ("get_weather", '{"city": "Ulm"}')
    grammar = compiled("tools", tools("required", call_format="deepseekv31"))
    assert is_text_of(grammar, block31(good))
    assert is_text_of(grammar, block31(good, ("now", '{"a": 1}')))
    assert parsed(block31(good), "deepseekv31") == ("", [("get_weather", {"city": "Ulm"})])
    for wrong in ("", "x", block31(("get_weather", "{}")), block31(("other", "{}")), block31(good) + "x"):
        assert not is_text_of(grammar, wrong), wrong
    grammar = compiled("tools", tools("auto", call_format="deepseekv31", parallel=False))
    assert is_text_of(grammar, "so: " + block31(good))
    assert is_text_of(grammar, "so")
    assert not is_text_of(grammar, block31(good, good))
    assert not is_text_of(grammar, "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>")


def tool(schema: Any, **fields: Any) -> Any:
    return {"type": "function", "function": {"name": "f", "parameters": schema, **fields}}


def test_what_of_a_tool_is_enforced(compiled: Compile) -> None:
    """All of it or a 400 when it is strict; as much as possible when it says nothing; nothing when it is not."""
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    parameter = '<｜DSML｜parameter name="{}" string="false">{}</｜DSML｜parameter>\n'
    call = f'<｜DSML｜invoke name="f">\n{parameter}</｜DSML｜invoke>\n'
    with pytest.raises(GrammarError, match="at /tools/0/function/parameters/properties/a: `uniqueItems`"):
        compiled("tools", tools("required", offered=(tool(odd, strict=True),)))
    grammar = compiled("tools", tools("required", offered=(tool(odd),)))
    assert is_text_of(grammar, block(call.format("a", "[1, 1]")))
    assert not is_text_of(grammar, block(call.format("a", "1")))
    grammar = compiled("tools", tools("required", offered=(tool({"type": "nope"}, strict=False),)))
    assert is_text_of(grammar, block(call.format("b", "1")))
    broken = {"type": "object", "properties": {"a": {"items": {"type": "nope"}}}}
    with pytest.raises(GrammarError, match="at /tools/1/function/parameters/properties/a/items: Unsupported type"):
        compiled("tools", tools("auto", offered=(NOTHING, tool(broken))))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "ab(c", "regex: .*at position 5: The parenthesis is not closed"),
        ("regex", r"a\p{L}", "regex: .*position 2.*not supported"),
        ("regex", "a.b(?=c)", "regex: .*position 6"),
        ("regex", "a^b", "regex: `\\^` at position 2"),
        ("ebnf", "root ::= a", 'ebnf: .*line 1, column 10: Rule "a" is not defined'),
        ("ebnf", 'x ::= "a"', "ebnf: .*root"),
        ("json_schema", "{", "json_schema: not JSON"),
        ("structural_tag", "{", "structural_tag: not JSON"),
        ("structural_tag", '{"type": "structural_tag"}', "structural_tag: .*format field"),
        ("structural_tag", '{"format": {"type": "bogus"}}', "structural_tag: .*bogus"),
        (
            "structural_tag",
            json.dumps(
                {"format": {"type": "sequence", "elements": [{"type": "json_schema", "json_schema": {"not": {}}}]}}
            ),
            "at /format/elements/0/json_schema: `not`",
        ),
        ("tools", tools({"type": "function", "function": {"name": "gone"}}), "tools: .*gone"),
        ("ebnf", "#" * (1 << 21), "too many"),
    ],
)
def test_errors_say_what_and_where(compiled: Compile, kind: Any, text: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as error:
        compiled(kind, text)
    assert error.value.status == 400
    assert "/project/" not in str(error.value)


def test_without_xgrammar_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(GrammarError, match=r"pip install 'baleen-llm\[grammar\]'"):
        GrammarReader(byte_vocabulary())


def test_without_eos_no_text_could_end() -> None:
    reader = GrammarReader(Vocabulary([b"a"], {}, []))
    with pytest.raises(GrammarError, match="eos"):
        reader.compile(Grammar(kind="regex", text="a"))


def test_white_space_is_bounded(compiled: Compile) -> None:
    grammar = compiled("json_schema", '{"type": "object", "required": ["a"]}')
    assert is_text_of(grammar, '{\n    "a" :\t1\n}')
    too_many = '{"a":' + " " * (grammar_text.MAX_WHITESPACE + 1) + "1}"
    assert not is_text_of(grammar, too_many)
    content = {"type": "json_schema", "json_schema": {"type": "object"}}
    grammar = compiled("structural_tag", json.dumps({"format": content}))
    assert is_text_of(grammar, '{\n    "a" :\t1\n}')
    assert not is_text_of(grammar, too_many)
    grammar = compiled("structural_tag", json.dumps({"format": {**content, "max_whitespace_cnt": None}}))
    assert is_text_of(grammar, too_many)
