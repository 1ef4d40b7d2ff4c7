"""Each schema with texts that are instances and texts that are not, as `jsonschema` knows; the grammar has to agree."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from baleen.sampling.conftest import Compile, is_text_of
from baleen.sampling.grammar_text import GrammarError
from baleen.sampling.json_schema import MAX_DEPTH, SchemaError, enforceable

OBJECT_A = {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}
OBJECT_B = {"type": "object", "properties": {"k": {"const": "b"}, "x": {"type": "integer"}}, "required": ["k"]}
ENFORCED: list[tuple[Any, list[str], list[str]]] = [
    ({"type": "object"}, ["{}", '{"a": [1]}'], ["1"]),
    ({}, ["{}", "1", '"x"', "null"], []),
    ({"minimum": 3}, ["4"], ["2"]),
    ({"minLength": 2}, ['"ab"', '"日本"'], ['"a"', '"\\n"', '"\\u0041"', '"日"']),
    ({"maxLength": 2}, ['"ab"'], ['"abc"']),
    ({"minLength": 1, "maxLength": 3}, ['"a"', '"日本x"'], ['""', '"abcd"']),
    ({"type": "string", "maxLength": 0}, ['""'], ['"a"']),
    ({"pattern": "^a+"}, ['"ab"'], ['"b"']),
    ({"minItems": 2}, ["[1, 2]"], ["[1]"]),
    ({"maxItems": 1}, ["[]", "[1]"], ["[1, 2]"]),
    ({"required": ["z"]}, ['{"z": 1}'], ["{}", '{"a": 1}']),
    ({"type": "object", "required": ["z"]}, ['{"z": 1}'], ["{}", '{"a": 1}']),
    ({"properties": {"a": {"type": "integer"}}, "required": ["z"]}, ['{"a": 1, "z": 2}'], ['{"a": 1}', '{"a": "x"}']),
    (
        {"type": "object", "required": ["z"], "additionalProperties": {"type": "string"}},
        ['{"z": "x"}', '{"z": "x", "y": "x"}'],
        ['{"z": 1}', '{"z": "x", "y": 1}'],
    ),
    ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    ({"type": ["integer", "string"], "enum": ["a", 1, None]}, ['"a"', "1"], ["null"]),
    ({"type": "number", "const": 2}, ["2"], ["3"]),
    ({"enum": [1, 1.5, "a", None, True, [1], {"x": []}]}, ["1", '"a"', "null", "true", "1.5"], ["2", "false"]),
    ({"type": "array", "minItems": 1}, ["[1]", '["a"]'], ["[]"]),
    ({"type": "array", "items": {"enum": [1]}, "maxItems": 2}, ["[1, 1]"], ["[2]", "[1, 1, 1]"]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, ['[1, "a"]'], ["[1, 2]"]),
    ({"type": "object", "maxProperties": 1}, ["{}", '{"a": 1}'], ['{"a": 1, "b": 2}']),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, ['{"b": 1}'], ["{}"]),
    ({"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 1}, ['{"a": 1}'], ["{}"]),
    ({"type": "object", "patternProperties": {"^x-": {"type": "integer"}}}, ['{"x-a": 1}'], ['{"x-a": "b"}']),
    (
        {"properties": {"a": {"type": "string"}}, "patternProperties": {"^x": {"type": "integer"}}},
        ['{"a": "b"}', '{"xa": 1}', '{"a": "b", "xb": 1}'],
        ['{"a": 1}', '{"xa": "b"}'],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, ['{"ab": 1}'], ['{"b": 1}']),
    ({"type": "string", "format": "date", "minLength": 2}, ['"xx"'], ['"x"']),
    ({"type": "string", "format": "date", "pattern": "^x"}, ['"xx"'], ['"2024-01-02"']),
    ({"type": "integer", "multipleOf": 3}, ["6", "-9"], ["7"]),
    ({"type": ["integer", "null"], "multipleOf": 7}, ["14", "null"], ["15"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, ["0.1", "1.5"], ["0", "1.6", "-1"]),
    ({"type": "number", "minimum": 0}, ["0", "3.25"], ["-1", "-0.5"]),
    ({"allOf": [{"type": "integer"}], "title": "x"}, ["1"], ['"x"']),
    ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "integer"}}}, ["1"], ['"x"']),
    ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, ["1", '"ab"'], ['"a"']),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["1.5"]),
    ({"oneOf": [OBJECT_A, OBJECT_B]}, ['{"k": "a"}', '{"k": "b", "x": 1}'], ['{"k": "c"}', "{}"]),
    (
        {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {"A": OBJECT_A, "B": OBJECT_B}},
        ['{"k": "a"}', '{"k": "b"}'],
        ['{"k": "b", "x": "y"}'],
    ),
    (
        {"type": "object", "anyOf": [{"required": ["a"]}, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]},
        ['{"a": 1}', '{"b": null}'],
        ["{}", '{"b": 1}', "1"],
    ),
    (
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}},
        ['{"c": {"c": {}}}'],
        ['{"c": 1}'],
    ),
    ({"properties": {"a": {"items": {"minimum": 5}}}}, ['{"a": [5]}'], ['{"a": [4]}']),
    ({"type": "array", "uniqueItems": False}, ["[1, 1]"], ["1"]),
    ({"type": "integer", "default": "x", "description": "y", "x-own": {"not": 1}}, ["1"], ['"x"']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), ENFORCED, ids=lambda value: str(value)[:60])
def test_texts_of_the_grammar_are_instances(compiled: Compile, schema: Any, good: list[str], bad: list[str]) -> None:
    before = copy.deepcopy(schema)
    grammar = compiled("json_schema", json.dumps(schema))
    for text in good:
        jsonschema.validate(json.loads(text), schema)
        assert is_text_of(grammar, text), text
    for text in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(text), schema)
        assert not is_text_of(grammar, text), text
    enforceable(schema)
    assert schema == before, "the argument was changed"


REFUSED: list[tuple[Any, str, str]] = [
    ({"not": {"type": "integer"}}, "", "`not`"),
    ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "/properties/a", "`uniqueItems`"),
    ({"items": {"contains": {}}}, "/items", "`contains`"),
    ({"if": {}, "then": {}}, "", "`if`"),
    ({"$defs": {"x": {"dependentRequired": {"a": ["b"]}}}}, "/$defs/x", "`dependentRequired`"),
    ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?=a)"}]}, "/anyOf/1/pattern", "lookahead"),
    ({"properties": {"a/b": {"type": "string", "pattern": "a$b"}}}, "/properties/a~1b/pattern", "position 3"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "", "`maxLength` beside `pattern`"),
    ({"enum": ["a"], "minLength": 3}, "", "`minLength` beside `enum`"),
    ({"type": "string", "const": 1}, "", "no value"),
    ({"enum": []}, "", "no value"),
    ({"type": "number", "multipleOf": 0.5}, "", "`multipleOf`"),
    ({"type": "integer", "multipleOf": 2000}, "", "`multipleOf`"),
    ({"type": "integer", "multipleOf": 3, "minimum": 4}, "", "`multipleOf` beside a bound"),
    ({"$ref": "https://example.com/x"}, "", "must start with '#/'"),
    ({"$ref": "#name"}, "", "must start with '#/'"),
    ({"items": {"$ref": "#/$defs/a", "minLength": 3}, "$defs": {"a": {}}}, "/items", "`$ref` beside"),
    ({"anyOf": [{}], "minimum": 3}, "", "`anyOf` beside `minimum`"),
    ({"type": "string", "anyOf": [{"type": "integer"}]}, "", "`anyOf` beside `type`"),
    ({"allOf": [{"required": ["a"]}, {"required": ["b"]}]}, "", "`allOf`"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "", "`oneOf`: schemas 0 and 1"),
    ({"oneOf": [OBJECT_A, OBJECT_A]}, "", "`oneOf`"),
    ({"required": ["z"], "additionalProperties": False}, "", "`required` names 'z'"),
    ({"properties": {"ab": {}}, "patternProperties": {"^a": {}}}, "", "matches one of"),
    ({"patternProperties": {"^a": {"type": "null"}, "b$": {}}}, "", "several patterns"),
    ({"properties": {"a": {}}, "propertyNames": {"maxLength": 3}}, "", "`propertyNames`"),
    ({"type": "object", "minProperties": 2}, "", "`minProperties`"),
    ({"properties": {"a": {}, "b": {}}, "minProperties": 2, "additionalProperties": True}, "", "`minProperties`"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "pointer", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, pointer: str, message: str) -> None:
    with pytest.raises(SchemaError) as error:
        enforceable(schema)
    assert error.value.pointer == pointer
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("schema", "where", "message"),
    [
        ({"type": "nope"}, "at the root:", "nope"),
        ({"type": "object", "properties": {"a": {"items": {"type": "nope"}}}}, "at /properties/a/items:", "nope"),
        ({"properties": {"a~/": {"minItems": 5, "maxItems": 3}}}, "at /properties/a~0~1:", "minItems"),
        ({"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1e30}]}, "at /anyOf/1:", "maximum"),
        ({"properties": {"a": {"type": "string", "pattern": "x("}}}, "at /properties/a:", "parenthesis"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}, "$defs": {"b": {}}}, "at /properties/a:", "gone"),
        ({"$defs": {"b": {"type": "x"}}, "properties": {"a": {"$ref": "#/$defs/b"}}}, "at /$defs/b:", "x"),
        ([], "at the root:", "object or bool"),
    ],
)
def test_a_schema_that_does_not_compile_says_where(compiled: Compile, schema: Any, where: str, message: str) -> None:
    with pytest.raises(GrammarError) as error:
        compiled("json_schema", json.dumps(schema))
    assert str(error.value).startswith("json_schema: ")
    assert where in str(error.value)
    assert message in str(error.value)
    assert "/project/" not in str(error.value)


@pytest.mark.parametrize(
    "schema", [{}, {"maxLength": 5}, {"minLength": 1}, {"pattern": "^a"}, {"propertyNames": {"maxLength": 5}}]
)
def test_strings_are_json(compiled: Compile, schema: Any) -> None:
    """No bare control character, quote or backslash: xgrammar's own bounded strings let some pass."""
    grammar = compiled("json_schema", json.dumps(schema))
    form = '{"a%s": 1}' if "propertyNames" in schema else '"a%s"'
    assert is_text_of(grammar, form % "b")
    for char in [*map(chr, range(32)), '"', "\\"]:
        assert not is_text_of(grammar, form % char), repr(char)


def test_lenient_leaves_out_what_cannot_be_enforced(compiled: Compile) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"minimum": 3}, "uniqueItems": True}}}
    grammar = compiled("json_schema", json.dumps(enforceable(schema, lenient=True)))
    assert is_text_of(grammar, '{"a": [3, 3]}')
    assert not is_text_of(grammar, '{"a": [2]}')
    written = enforceable({**schema, "required": ["b"]}, lenient=True)
    assert "b" in written["properties"]


def test_nesting_is_bounded(compiled: Compile) -> None:
    def nested(depth: int) -> str:
        return '{"items":' * depth + "{}" + "}" * depth

    enforceable(json.loads(nested(MAX_DEPTH)))
    for depth in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(GrammarError, match="nested"):
            compiled("json_schema", nested(depth))
