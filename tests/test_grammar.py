"""Constrained decoding through the whole engine, on a model with random weights: whatever it would like to say, what it
says is valid.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from baleen.chat.output_parser import Content, OutputParser, ToolArguments, ToolCall
from baleen.llm import LLM, Completion
from baleen.messages import GenerateRequest, Grammar, OpenSlot, SamplingParams, TokenOutput, pack_ids
from baleen.model.random_checkpoint import FIRST_BYTE_ID, LAST_TOKENS, build_random_checkpoint
from baleen.sampling.grammar_text import GrammarReader

EOS = 1
PROMPT = [(7 * i) % 250 + FIRST_BYTE_ID for i in range(130)]
MAX_TOKENS = 3000


def mark(text: str) -> int:
    return FIRST_BYTE_ID + 256 + list(LAST_TOKENS).index(text)


THINK_END = mark("</think>")


def byte_bias(**values: float) -> tuple[tuple[int, float], ...]:
    return tuple((FIRST_BYTE_ID + ord(char), value) for char, value in values.items())


# A random model rambles: it closes a bracket as readily as it opens another. This makes its texts end, no more valid.
CLOSING = byte_bias(**{'"': 4.0, "]": 4.0, "}": 4.0, " ": -8.0, "\n": -8.0, "\t": -8.0, "\r": -8.0, ",": -1.0})

_STRING: dict[str, Any] = {"type": "string", "maxLength": 8}
_POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
_SHAPES = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}},
            "required": ["kind", "r"],
        },
        {"type": "object", "properties": {"kind": {"const": "point"}, "at": _POINT}, "required": ["kind", "at"]},
    ]
}
SCHEMAS: list[Any] = [
    # values
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "string"},
    {"const": "yes"},
    {"enum": ["red", "green", 3, None, {"a": [1]}]},
    {"type": ["integer", "null"]},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    {"minimum": 10},
    # bounds, patterns, formats
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1000},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -2.5, "maximum": 1e6},
    {"type": "string", "minLength": 5, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    {"type": "string", "pattern": "[aeiou]"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "email", "maxLength": 10},
    {"enum": [f"choice {i}" for i in range(300)]},
    # arrays
    {"type": "array", "items": {"type": "integer"}},
    {"type": "array", "items": _STRING, "minItems": 3, "maxItems": 3},
    {"type": "array", "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}, _STRING], "items": False, "minItems": 2},
    {
        "type": "array",
        "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2},
        "maxItems": 4,
    },
    {"items": {"anyOf": [{"type": "null"}, _POINT]}, "maxItems": 3},
    # objects
    {"type": "object"},
    {"type": "object", "properties": {}, "additionalProperties": False},
    _POINT,
    {"type": "object", "properties": {"a": _STRING, "b": {"type": "integer"}}},
    {"type": "object", "required": ["anything"]},
    {"properties": {"a": _STRING}, "required": ["a", "b"], "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x-[a-z]{1,3}$": {"type": "integer"}}, "maxProperties": 2},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,4}$"}, "additionalProperties": _STRING},
    {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2, "maxProperties": 2},
    {
        "type": "object",
        "properties": {'quo"te': _STRING, "日本": {"const": "é\n\\"}, "": {"type": "null"}},
        "required": [""],
    },
    # together
    {"type": "object", "properties": {"line": {"type": "array", "items": _POINT, "minItems": 1}}, "required": ["line"]},
    {"allOf": [_POINT], "title": "a point", "description": "in the plane"},
    {"anyOf": [_POINT, {"type": "array", "items": _POINT, "maxItems": 2}, {"type": "null"}]},
    _SHAPES,
    {"type": "array", "items": _SHAPES, "minItems": 2, "maxItems": 3},
    _TREE,
    {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "v": {"enum": [1]}},
        "required": ["v"],
    },
    {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 3}, "b": _STRING},
    },
    {
        "type": "object",
        "properties": {f"field_{i}": [{"enum": [i, -i]}, _STRING, {"type": "boolean"}][i % 3] for i in range(30)},
        "required": [f"field_{i}" for i in range(0, 30, 2)],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "created": {"type": "string", "format": "date-time"},
            "status": {"enum": ["open", "closed"]},
            "author": {
                "type": "object",
                "properties": {"name": _STRING, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
                "required": ["name", "age"],
            },
            "comments": {
                "type": "array",
                "items": {"type": "object", "required": ["text"], "properties": {"text": _STRING}},
            },
            "extra": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
        },
        "required": ["id", "created", "status", "author", "comments", "extra"],
    },
    {
        "$defs": {
            "expr": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/call"}]},
            "call": {
                "type": "object",
                "properties": {
                    "op": {"enum": ["add", "mul"]},
                    "args": {"type": "array", "items": {"$ref": "#/$defs/expr"}, "minItems": 1, "maxItems": 2},
                },
                "required": ["op", "args"],
                "additionalProperties": False,
            },
        },
        "type": "object",
        "properties": {"program": {"type": "array", "items": {"$ref": "#/$defs/call"}, "minItems": 1, "maxItems": 3}},
        "required": ["program"],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_checkpoint(tmp_path_factory.mktemp("model") / "tiny", size="tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_running_requests=64) as llm:
        yield llm


def schema_params(schema: Any, seed: int, **fields: Any) -> SamplingParams:
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    settings = {"max_new_tokens": MAX_TOKENS, "logit_bias": CLOSING, "seed": seed, **fields}
    return SamplingParams(grammar=grammar, **settings)


def text_params(kind: Any, text: str, **fields: Any) -> SamplingParams:
    starts_after = fields.pop("starts_after", None)
    return SamplingParams(grammar=Grammar(kind=kind, text=text, starts_after=starts_after), **{"seed": 0, **fields})


def text_of(llm: LLM, token_ids: Sequence[int]) -> str:
    """With the marks that a user would not see, without the eos at the end."""
    assert list(token_ids).index(EOS) == len(token_ids) - 1, "one eos, at the end"
    return b"".join(llm.tokenizer.token_bytes(token_id) for token_id in token_ids[:-1]).decode(errors="replace")


def prompts(count: int) -> list[list[int]]:
    """Prompts that share none, one or two pages."""
    return [[*PROMPT[: (5, 64, 70, 130)[i % 4]], FIRST_BYTE_ID + i % 200] for i in range(count)]


def test_fifty_schemas(llm: LLM) -> None:
    """In one batch with rows that are free; these get the tokens they get alone."""
    assert len(SCHEMAS) == 50
    free = [SamplingParams(max_new_tokens=40, temperature=t, seed=t, ignore_eos=True, logprobs=2) for t in (0, 1, 1)]
    alone = [llm.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts(3), free)]
    params = [*free, *(schema_params(schema, seed) for seed, schema in enumerate(SCHEMAS))]
    answers = llm.generate(prompts(len(params)), params)
    assert [answer.token_ids for answer in answers[:3]] == alone
    for schema, answer in zip(SCHEMAS, answers[3:]):
        assert answer.finish_reason == "stop", (schema, answer.text)
        check(llm, schema, answer)
    stats = llm.engine.stats()
    assert stats.num_grammar_compiled_total >= 50
    assert stats.num_grammar_queue == 0
    assert stats.grammar_mask_seconds_total > 0
    assert stats.num_cached_tokens_total > 0, "no prefix was shared"


def check(llm: LLM, schema: Any, answer: Completion) -> None:
    value = json.loads(text_of(llm, answer.token_ids))
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "uuid"])).validate(value)


@pytest.mark.parametrize("overlap", [True, False])
def test_little_memory(llm: LLM, folder: Path, overlap: bool) -> None:
    """Chunked prompts, retractions in the middle of a text, several requests with one grammar: the same texts."""
    schema = json.dumps(SCHEMAS[40])
    params = [
        text_params("regex", "[a-z]{40}[0-9]{20}", seed=1, max_new_tokens=80),
        text_params("json_schema", schema, seed=2, max_new_tokens=100, logit_bias=CLOSING),
        text_params("regex", "[a-z]{40}[0-9]{20}", seed=3, max_new_tokens=80),
        text_params("ebnf", 'root ::= ([0-9] "," ){30}', seed=4, max_new_tokens=80),
        text_params("json_schema", schema, seed=5, max_new_tokens=100, logit_bias=CLOSING),
    ]
    starts = [[*PROMPT[:n], FIRST_BYTE_ID + n] for n in (125, 60, 62, 125, 61)]
    expected = [answer.token_ids for answer in llm.generate(starts, params)]
    assert all(token_ids[-1] == EOS for token_ids in expected)
    settings = {"max_total_tokens": 64 * 8, "chunked_prefill_size": 64, "schedule_conservativeness": 0.01}
    with LLM(str(folder), disable_overlap_schedule=not overlap, context_length=512, **settings) as small:
        for one in params:  # so that they arrive together
            assert one.grammar is not None
            small.engine._compiler.submit(one.grammar).result(60)
        got = [answer.token_ids for answer in small.generate(starts, params)]
        stats = small.engine.stats()
        small.engine.scheduler.check_invariants()
    assert stats.num_retractions_total > 0
    assert stats.num_grammar_compiled_total == 3, "a grammar is compiled once"
    assert got == expected


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "[a-c]{3,9}(x|yy)", "[a-c]{3,9}(x|yy)"),
        ("regex", "(yes|no)( indeed)?", "(yes|no)( indeed)?"),
        ("regex", "a.{5}", "a.{5}"),
        ("ebnf", 'root ::= item ("," item){2}\nitem ::= [0-9]+ | "(" root ")"', r"[0-9(),]+"),
        (
            "structural_tag",
            '{"format": {"type": "tag", "begin": "<a>", "end": "</a>", "content": {"type": "regex", "pattern": "a+"}}}',
            "<a>a+</a>",
        ),
    ],
)
def test_other_kinds(llm: LLM, kind: str, text: str, pattern: str) -> None:
    params = [text_params(kind, text, seed=seed, max_new_tokens=800, logit_bias=CLOSING) for seed in range(6)]
    for answer in llm.generate(prompts(6), params):
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, text_of(llm, answer.token_ids)), text_of(llm, answer.token_ids)


def test_the_grammar_wins(llm: LLM) -> None:
    """Over a bias, over min_new_tokens, over ignore_eos, over greedy and narrow sampling; the logprobs stay finite."""
    bias = ((FIRST_BYTE_ID + ord("z"), 100.0), (FIRST_BYTE_ID + ord("a"), -100.0), (EOS, 100.0))
    cases = [
        {"logit_bias": bias},
        {"min_new_tokens": 50},
        {"ignore_eos": True},
        {"ignore_eos": True, "min_new_tokens": 50, "logit_bias": bias},
        {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"top_k": 1},
        {"top_k": 5, "top_p": 0.1, "min_p": 0.5},
        {"top_p": 0.01, "logprobs": 5},
        {"temperature": 0.0, "logprobs": 5},
    ]
    params = [text_params("regex", "a{3}b", max_new_tokens=100, **case) for case in cases]
    for case, answer in zip(cases, llm.generate([PROMPT[:5]] * len(params), params)):
        assert text_of(llm, answer.token_ids) == "aaab", case
        assert (answer.finish_reason, answer.stop) == ("stop", EOS)
        for entry in answer.logprobs:
            assert all(-1e4 < logprob < 0 for logprob in (entry.logprob, *(logprob for _, logprob in entry.top)))


def test_length_cuts(llm: LLM) -> None:
    (answer,) = llm.generate(PROMPT[:5], text_params("regex", "a{50}", max_new_tokens=10))
    assert (answer.text, answer.finish_reason) == ("a" * 10, "length")


def test_thinking_is_free(llm: LLM) -> None:
    """Until the one token `</think>`, which the model is made to say sooner or later."""
    bias = ((THINK_END, 4.0), (EOS, -100.0))
    params = [
        text_params("regex", "[0-9]{4}", starts_after=THINK_END, logit_bias=bias, seed=seed, ignore_eos=bool(seed % 2))
        for seed in range(4)
    ]
    for answer in llm.generate(prompts(4), [*params]):
        assert answer.finish_reason == "stop"
        thought, _, text = text_of(llm, answer.token_ids).partition("</think>")
        assert re.fullmatch("[0-9]{4}", text)
        assert thought
        assert not re.fullmatch("[0-9]*", thought)
    endless = text_params("regex", "a", starts_after=THINK_END, max_new_tokens=20, logit_bias=((THINK_END, -100.0),))
    (answer,) = llm.generate(PROMPT[:5], endless)
    assert len(answer.token_ids) <= 20
    assert answer.finish_reason in ("length", "stop")


TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {**_POINT, "additionalProperties": False}}},
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"text": _STRING, "loud": {"type": "boolean"}, "to": {"type": "array", "items": _STRING}},
                "required": ["text"],
            },
        },
    },
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize("call_format", ["deepseekv32", "deepseekv31"])
def test_tool_calls(llm: LLM, call_format: Any) -> None:
    """Made by the grammar, read by the parser: known names, arguments of the tool's schema, no stray text."""
    parameters = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    named = {"type": "function", "function": {"name": "look"}}
    cases = [("required", True), ("required", False), (named, True), (named, False)]
    bias = CLOSING + byte_bias(**{"<": 4.0, "/": 4.0}) + ((mark("<｜tool▁calls▁end｜>"), 4.0),)
    params = []
    for choice, parallel in cases:
        text = {"format": call_format, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}
        params += [
            text_params("tools", json.dumps(text), max_new_tokens=MAX_TOKENS, logit_bias=bias, seed=seed)
            for seed in range(4)
        ]
    for i, answer in enumerate(llm.generate(prompts(len(params)), params)):
        assert answer.finish_reason == "stop"
        choice, parallel = cases[i // 4]
        text = text_of(llm, answer.token_ids)
        calls = parse(text, call_format, list(parameters))
        assert calls, text
        if not parallel or choice is named:
            assert len(calls) == 1
        for name, arguments in calls:
            assert name == "look" or choice == "required"
            jsonschema.validate(arguments, parameters[name])


def parse(text: str, call_format: Any, functions: list[str]) -> list[tuple[str, Any]]:
    parser = OutputParser(tool_parser=call_format, in_reasoning=False, functions=functions)
    calls: list[list[str]] = []
    for event in parser.push(text) + parser.finish():
        match event:
            case ToolCall(name=name):
                calls.append([name, ""])
            case ToolArguments(index=index, text=more):
                calls[index][1] += more
            case Content(text=more):
                assert not more.strip(), more
    return [(name, json.loads(arguments)) for name, arguments in calls]


# ---- what goes wrong, and what comes in between ----------------------------------------------------------------------


def request(rid: str, params: SamplingParams) -> GenerateRequest:
    return GenerateRequest(rid=rid, input_ids=pack_ids(PROMPT[:5]), sampling=params)


def run(llm: LLM) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while llm.engine.has_work:
        for output in llm.engine.step():
            outputs.setdefault(output.rid, []).append(output)
    return outputs


def test_a_grammar_that_does_not_compile_is_a_400(llm: LLM) -> None:
    failed = llm.engine.stats().num_grammar_failed_total
    llm.engine.add(request("good", text_params("regex", "ab")))
    llm.engine.add(request("bad", schema_params({"properties": {"x": {"not": {}}}}, 0)))
    llm.engine.add(request("free", SamplingParams(max_new_tokens=3, seed=0, ignore_eos=True)))
    outputs = run(llm)
    assert [(o.finish_reason, o.status, o.message) for o in outputs["bad"]] == [
        ("error", 400, "json_schema: at /properties/x: `not` cannot be enforced; leave it out")
    ]
    assert outputs["good"][-1].finish_reason == "stop"
    assert outputs["free"][-1].finish_reason == "length"
    assert llm.engine.stats().num_grammar_failed_total == failed + 1
    with pytest.raises(ValueError, match="parenthesis"):
        llm.generate(PROMPT[:5], text_params("regex", "("))


def test_compiling_holds_up_nobody_and_can_be_aborted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, compile_now = threading.Event(), GrammarReader.compile

    def compile_later(reader: GrammarReader, grammar: Grammar) -> Any:
        assert gate.wait(60)
        return compile_now(reader, grammar)

    monkeypatch.setattr(GrammarReader, "compile", compile_later)
    engine = llm.engine
    before = engine.stats().num_aborted_total
    engine.add(request("kept", text_params("regex", "q{3}")))
    engine.add(request("gone", text_params("regex", "q{4}")))
    engine.add(request("free", SamplingParams(max_new_tokens=3, seed=0, ignore_eos=True)))
    ended: list[str] = []
    while "free" not in ended:
        ended += [output.rid for output in engine.step() if output.finish_reason is not None]
    assert engine.stats().num_grammar_queue == 2
    engine.abort("gone")
    assert engine.stats().num_grammar_queue == 1
    assert engine.stats().num_aborted_total == before + 1
    assert not engine.flush_cache().ok
    assert engine.step() == []
    gate.set()
    outputs = run(llm)
    assert set(outputs) == {"kept"}
    assert outputs["kept"][-1].finish_reason == "stop"
    engine.scheduler.check_invariants()
    assert engine.flush_cache().ok


def test_a_token_against_the_grammar_ends_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot happen; if it does, the others go on."""
    masks = llm.engine.runner.grammars
    mask_now, broken_slots, opened_slots = masks.mask, set(), []

    def open_slot(slot: int, opened: OpenSlot, compiled: Any, do: Any = masks.open) -> None:
        opened_slots.append(slot)
        if opened.sampling.seed == 13:
            broken_slots.add(slot)
        do(slot, opened, compiled)

    def mask(logits: torch.Tensor, slots: Sequence[int]) -> Any:
        masked, errors = mask_now(logits, slots)
        for row, slot in enumerate(slots):
            if slot in broken_slots:
                masked[row] = logits[row]  # as if the mask were lost
        return masked, errors

    monkeypatch.setattr(masks, "open", open_slot)
    monkeypatch.setattr(masks, "mask", mask)
    bias = ((FIRST_BYTE_ID + ord("z"), 100.0),)
    llm.engine.add(request("bad", text_params("regex", "ab{50}", seed=13, logit_bias=bias)))
    llm.engine.add(request("good", text_params("regex", "ab{50}", seed=1, logit_bias=bias)))
    outputs = run(llm)
    assert len(opened_slots) == 2
    assert [output.finish_reason for output in outputs["bad"]] == [None, "error"]
    assert outputs["bad"][-1].status == 500
    assert "against the grammar" in outputs["bad"][-1].message
    assert outputs["good"][-1].finish_reason == "stop"
    llm.engine.scheduler.check_invariants()


def test_an_abort_in_the_middle_of_a_text(llm: LLM) -> None:
    llm.engine.add(request("a", text_params("regex", "a{200}", max_new_tokens=300)))
    llm.engine.add(request("b", text_params("regex", "b{20}")))
    for _ in range(6):
        llm.engine.step()
    llm.engine.abort("a")
    llm.engine.add(request("c", text_params("regex", "c{20}")))
    outputs = run(llm)
    assert (
        b"".join(llm.tokenizer.token_bytes(i) for o in outputs["c"] for i in o.token_ids[:1] if i != EOS) == b"c" * 20
    )
    assert outputs["b"][-1].finish_reason == "stop"
    assert not llm.engine._compiled, "grammars of requests that ended are held"
