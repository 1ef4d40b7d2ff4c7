"""What /v1/responses makes of its input items and tools, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from baleen.messages import unpack_ids
from baleen.server.conftest import Server
from baleen.server.test_responses import (
    ADD,
    ARGUMENTS,
    BOS,
    CALL,
    CUSTOM,
    CUSTOM_CALL,
    EOS,
    FILES,
    FILES_CALLS,
    FUNCTION_CALL,
    OUT,
    RESULT,
    THINK,
    USER,
    WRITTEN,
    D,
    asked,
    create,
    refusal,
)

# ---- input -> prompt -----------------------------------------------------------------------------------------------

TEXT = "input_text"


@pytest.mark.parametrize(
    ("items", "prompt"),
    [
        ([USER], "<｜User｜>q<｜Assistant｜></think>"),
        (
            [{"type": "message", "role": "user", "content": [{"type": TEXT, "text": "q"}]}],
            "<｜User｜>q<｜Assistant｜></think>",
        ),
        # A system message stands at the start alone; what comes later joins what it follows.
        (
            [{"role": "developer", "content": "d"}, {"role": "system", "content": [{"type": TEXT, "text": "s"}]}, USER],
            "d\n\ns<｜User｜>q<｜Assistant｜></think>",
        ),
        ([USER, {"role": "developer", "content": "d"}, USER], "<｜User｜>q\n\nd\n\nq<｜Assistant｜></think>"),
        # Texts of the user one after the other are one turn.
        (
            [{"role": "user", "content": [{"type": TEXT, "text": "a"}, {"type": TEXT, "text": "b"}]}, USER],
            "<｜User｜>a\n\nb\n\nq<｜Assistant｜></think>",
        ),
        (
            [
                USER,
                {"role": "assistant", "content": "a"},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "b"}],
                    "id": "msg_1",
                },
                USER,
            ],
            f"<｜User｜>q<｜Assistant｜></think>a\n\nb{EOS}<｜User｜>q<｜Assistant｜></think>",
        ),
        (
            [
                USER,
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "developer", "content": "d"},
            ],
            f"<｜User｜>q<｜Assistant｜></think>no{EOS}<｜User｜>d<｜Assistant｜></think>",
        ),
        (
            [USER, FUNCTION_CALL, OUT | {"output": "3"}],
            f"<｜User｜>q<｜Assistant｜></think>{WRITTEN}{RESULT}</think>",
        ),
        (
            [
                USER,
                FUNCTION_CALL,
                OUT | {"output": [{"type": TEXT, "text": "3"}]},
                {"role": "developer", "content": "d"},
            ],
            f"<｜User｜>q<｜Assistant｜></think>{WRITTEN}{RESULT.replace('3', '3' + chr(10) * 2 + 'd')}</think>",
        ),
        # What the model wrote wrong can be told of: a call without an object keeps its text.
        (
            [USER, FUNCTION_CALL | {"arguments": '{"a": '}, OUT | {"output": "3"}],
            f'<｜User｜>q<｜Assistant｜></think>\n\n<{D}function_calls>\n<{D}invoke name="add">\n'
            f'<{D}parameter name="arguments" string="true">{{"a": </{D}parameter>\n'
            f"</{D}invoke>\n</{D}function_calls>{RESULT}</think>",
        ),
        # A question after the results ends the loop.
        (
            [USER, FUNCTION_CALL, OUT | {"output": "3"}, USER],
            f"<｜User｜>q<｜Assistant｜></think>{WRITTEN}{RESULT}</think><｜User｜>q<｜Assistant｜></think>",
        ),
        (
            [
                USER,
                {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": '*** a "b"\n'},
                {"type": "custom_tool_call_output", "call_id": "c", "output": "3"},
            ],
            f"<｜User｜>q<｜Assistant｜></think>\n\n{CUSTOM_CALL}{RESULT}</think>",
        ),
        (
            [USER, FUNCTION_CALL | {"namespace": "mcp__files"}, OUT | {"output": "3"}],
            f"<｜User｜>q<｜Assistant｜></think>{WRITTEN.replace('add', 'mcp__files__add')}{RESULT}</think>",
        ),
    ],
)
def test_input_items_make_the_prompt(agent: Server, items: list[Any], prompt: str) -> None:
    script = agent.play("x")
    create(agent, input=items)
    assert asked(script, agent, BOS + prompt)


@pytest.mark.parametrize(
    "kept",
    [
        {"content": [{"type": "reasoning_text", "text": "R1"}, {"type": "reasoning_text", "text": "R2"}]},
        {"summary": [{"type": "summary_text", "text": "R1R2"}], "encrypted_content": "gAAAAnother+server's=="},
        {"encrypted_content": "baleen-UjFSMg==", "summary": []},
    ],
)
def test_reasoning_comes_back_in_each_of_its_forms(agent: Server, kept: dict[str, Any]) -> None:
    script = agent.play("x</think>y")
    items = [USER, {"type": "reasoning", "id": "rs_1"} | kept, FUNCTION_CALL, OUT | {"output": "3"}]
    create(agent, input=items, **THINK)
    assert asked(script, agent, f"{BOS}<｜User｜>q<｜Assistant｜><think>R1R2</think>{WRITTEN}{RESULT}<think>")
    create(agent, input=items)  # without thinking nothing is kept of it
    assert asked(script, agent, f"{BOS}<｜User｜>q<｜Assistant｜></think>{WRITTEN}{RESULT}</think>")


def test_unreadable_reasoning_of_another_server_is_left_out(agent: Server) -> None:
    script = agent.play("x</think>y")
    items = [
        USER,
        {"type": "reasoning", "encrypted_content": "gAAAA", "summary": []},
        {"role": "assistant", "content": "a"},
    ]
    create(agent, input=[*items, USER], **THINK)
    assert asked(script, agent, f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}<｜User｜>q<｜Assistant｜><think>")


@pytest.mark.parametrize(
    ("items", "field", "words"),
    [
        ([{"type": "web_search_call", "id": "ws_1"}], "input[0].type", "web_search_call"),
        (
            [USER, {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[1].content[0]",
            "input_image",
        ),
        ([USER, FUNCTION_CALL, OUT | {"output": [{"type": "input_file"}]}], "input[2].output[0]", "input_file"),
        ([{"role": "tool", "content": "x"}], "input[0].role", "user"),
        ([USER, {"type": "function_call", "call_id": "c", "name": "add"}], "input[1].arguments", "required"),
        ([{"type": "item_reference", "id": "rs_unknown"}], "input[0].id", "rs_unknown"),
        ([{"type": "message", "content": "x"}], "input[0].role", "required"),
        ([USER, {"role": "assistant", "content": "a"}], "input[1].role", "nothing to answer"),
        ([USER, USER, FUNCTION_CALL], "input[2].tool_calls", "results"),
        ([], "input", "at least 1"),
        (3, "input", "string"),
    ],
)
def test_bad_input_is_refused_by_name(agent: Server, items: Any, field: str, words: str) -> None:
    param, message = refusal(agent, {"input": items})
    assert param is not None
    assert param.startswith(field)
    assert message.startswith(param)
    assert words in message


# ---- tools ---------------------------------------------------------------------------------------------------------


def test_a_custom_tool_is_a_function_of_one_text(agent: Server) -> None:
    script = agent.play(CUSTOM_CALL)
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** " /.+/'}
    (call,) = create(agent, tools=[CUSTOM | {"format": grammar}]).output
    assert (call.type, call.name, call.input, call.call_id[:5]) == ("custom_tool_call", "patch", '*** a "b"\n', "call_")
    prompt = "".join(agent.tokenizer.token_text(i) for i in unpack_ids(script.requests[0].input_ids))
    assert (
        '\n{"name": "patch", "description": "Patches\\n\\n`input` must follow this grammar (lark):\\nstart: '
        '\\"*** \\" /.+/", "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, '
        '"required": ["input"]}}\n'
    ) in prompt


@pytest.mark.parametrize(
    ("parameters", "written"),
    [
        (f'<{D}parameter name="text" string="true">a</{D}parameter>', '{"text": "a"}'),
        (f'<{D}parameter name="input" string="false">[1]</{D}parameter>', '{"input": [1]}'),
        (
            f'<{D}parameter name="input" string="true">a</{D}parameter>\n'
            f'<{D}parameter name="n" string="true">b</{D}parameter>',
            '{"input": "a", "n": "b"}',
        ),
        ("", ""),
    ],
)
def test_a_custom_tool_called_in_another_way_gets_all_that_was_written(
    agent: Server, parameters: str, written: str
) -> None:
    agent.play(f'<{D}function_calls>\n<{D}invoke name="patch">\n{parameters}\n</{D}invoke>\n</{D}function_calls>')
    (call,) = create(agent, tools=[CUSTOM]).output
    assert call.input == written


def test_a_namespace_groups_tools(agent: Server) -> None:
    script = agent.play(FILES_CALLS)
    response = create(agent, tools=[FILES, ADD])
    function, custom = response.output
    assert (function.namespace, function.name, function.arguments) == ("mcp__files", "add", ARGUMENTS)
    assert (custom.namespace, custom.name, custom.input) == ("mcp__files", "patch", '*** a "b"\n')
    assert len(response.tools) == 2
    prompt = "".join(agent.tokenizer.token_text(i) for i in unpack_ids(script.requests[0].input_ids))
    assert '\n{"name": "mcp__files__add", "description": "Adds\\n\\nmcp__files: Files.", "parameters"' in prompt
    assert '\n{"name": "mcp__files__patch", "description": "Patches", "parameters"' in prompt
    assert '\n{"name": "add", "description": "Adds", "parameters"' in prompt


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "image_generation"])
def test_what_agents_offer_to_every_server_is_left_out_beside_tools_of_their_own(agent: Server, kind: str) -> None:
    script = agent.play("x")
    response = create(agent, tools=[{"type": kind}, ADD])
    assert [tool.type for tool in response.tools] == ["function"]  # the answer says so
    prompt = "".join(agent.tokenizer.token_text(i) for i in unpack_ids(script.requests[0].input_ids))
    assert kind not in prompt
    assert refusal(agent, {"tools": [{"type": kind}]})[0] == "tools[0].type"
    assert refusal(agent, {"tools": [{"type": kind}, ADD], "tool_choice": {"type": kind}})[0] == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        *(
            ({"tools": [ADD, {"type": kind}]}, "tools[1].type")
            for kind in (
                "mcp",
                "file_search",
                "code_interpreter",
                "local_shell",
                "shell",
                "apply_patch",
                "tool_search",
                None,
            )
        ),
        ({"tools": [ADD | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [ADD | {"parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [ADD, ADD]}, "tools[1].name"),
        ({"tools": [{"type": "web_search"}, ADD, ADD]}, "tools[2].name"),
        ({"tools": [ADD | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [FILES | {"tools": [{"type": "mcp"}]}]}, "tools[0].tools[0].type"),
        ({"tools": [FILES | {"tools": [FILES]}]}, "tools[0].tools[0].type"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        (
            {"tools": [ADD], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [3]}},
            "tool_choice.tools[0]",
        ),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"include": ["everything"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"input": "long " * 10_000}, "input"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(agent: Server, fields: dict[str, Any], field: str) -> None:
    param, message = refusal(agent, fields)
    assert param == field
    assert message.startswith(field) or field == "previous_response_id"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("required", "required"),
        ({"type": "function", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
        ({"type": "custom", "name": "patch"}, {"type": "function", "function": {"name": "patch"}}),
        (
            {"type": "function", "name": "add", "namespace": "mcp__files"},
            {"type": "function", "function": {"name": "mcp__files__add"}},
        ),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]}, "required"),
    ],
)
def test_tool_choice_is_enforced(agent: Server, choice: Any, expected: Any) -> None:
    script = agent.play(CALL)
    create(agent, tools=[ADD, CUSTOM, FILES], tool_choice=choice, parallel_tool_calls=False)
    grammar = script.requests[0].sampling.grammar
    assert grammar is not None
    spec = json.loads(grammar.text)
    assert (grammar.kind, spec["tool_choice"], spec["parallel_tool_calls"]) == ("tools", expected, False)
    if choice != "required" and expected == "required":
        assert [tool["function"]["name"] for tool in spec["tools"]] == ["patch"]


def test_structured_output_through_the_clients_parser(agent: Server) -> None:
    class Point(pydantic.BaseModel):
        x: int
        y: int

    script = agent.play('{"x": 1, "y": 2}')
    response = agent.openai().responses.parse(model="default", input="hi", text_format=Point)
    assert response.output_parsed == Point(x=1, y=2)
    grammar = script.requests[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    assert set(json.loads(grammar.text)["properties"]) == {"x", "y"}


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_grammar_library_cannot_do_is_refused_by_name(agent: Server, stream: bool) -> None:
    agent.play(fail_after=0, refusal="no such schema")
    text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    param, message = refusal(agent, {"text": text, "stream": stream})
    assert (param, message) == ("text.format", "text.format: no such schema")
