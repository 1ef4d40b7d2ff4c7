"""The V3.2 prompt text, letter for letter, against texts written out by hand from the wire format."""

from __future__ import annotations

from typing import Any

import pytest

from baleen.chat.conversation import Conversation, EncodingError, read_messages
from baleen.chat.encoding import encode, render

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
HELLO = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
    {"role": "user", "content": "1+1=?"},
]
TOOLS_HEAD = """\


## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
"""  # noqa: E501
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für eine Stadt",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WEATHER_TEXT = """{"name": "weather", "description": "Wetter für eine Stadt", "parameters": {"type": "object", \
"properties": {"city": {"type": "string"}}, "required": ["city"]}}"""
NOW = {"type": "function", "function": {"strict": True, "parameters": {}, "name": "now"}}
NOW_TEXT = '{"strict": true, "parameters": {}, "name": "now"}'


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def calls(*tool_calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(tool_calls), **fields}


def result(content: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# name -> (fields of the Conversation, the prompt)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "one question": ({"messages": [user("hi")]}, f"{BOS}<｜User｜>hi<｜Assistant｜></think>"),
    "one question, thinking": (
        {"messages": [user("hi")], "thinking": True},
        f"{BOS}<｜User｜>hi<｜Assistant｜><think>",
    ),
    "the model card's example": (
        {"messages": HELLO, "thinking": True},
        f"{BOS}<｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.{EOS}<｜User｜>1+1=?<｜Assistant｜><think>",
    ),
    "the same without thinking": (
        {"messages": HELLO},
        f"{BOS}<｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.{EOS}<｜User｜>1+1=?<｜Assistant｜></think>",
    ),
    "system raw wherever it stands": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user("a"),
                {"role": "assistant", "content": "b"},
                {"role": "system", "content": "Now be long."},
                user("c"),
            ]
        },
        f"{BOS}Be brief.<｜User｜>a<｜Assistant｜></think>b{EOS}Now be long.<｜User｜>c<｜Assistant｜></think>",
    ),
    "empty system": (
        {"messages": [{"role": "system", "content": None}, user("a")], "thinking": True},
        f"{BOS}<｜User｜>a<｜Assistant｜><think>",
    ),
    "two user turns, roles in capitals": (
        {"messages": [{"role": "USER", "content": "a"}, {"role": "User", "content": "b"}], "thinking": True},
        f"{BOS}<｜User｜>a<｜Assistant｜></think><｜User｜>b<｜Assistant｜><think>",
    ),
    "content parts": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}])]},
        f"{BOS}<｜User｜>a b\n<｜Assistant｜></think>",
    ),
    "tools without a system message": (
        {"messages": [user("hi")], "tools": [WEATHER]},
        f"{BOS}{TOOLS_HEAD}{WEATHER_TEXT}\n</functions>\n<｜User｜>hi<｜Assistant｜></think>",
    ),
    "tools after the system text, with the client's keys": (
        {
            "messages": [{"role": "system", "content": "Help."}, user("hi")],
            "tools": [WEATHER, NOW],
            "thinking": True,
        },
        f"{BOS}Help.{TOOLS_HEAD}{WEATHER_TEXT}\n{NOW_TEXT}\n</functions>\n<｜User｜>hi<｜Assistant｜><think>",
    ),
    "tools of a message": (
        {"messages": [{"role": "system", "content": "Help.", "tools": [NOW]}, user("hi")]},
        f"{BOS}Help.{TOOLS_HEAD}{NOW_TEXT}\n</functions>\n<｜User｜>hi<｜Assistant｜></think>",
    ),
    "response format": (
        {"messages": [user("hi")], "response_schema": {"type": "object", "title": "Größe"}},
        f"{BOS}\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "title": "Größe"}<｜User｜>hi<｜Assistant｜></think>',
    ),
    "tools, then response format": (
        {
            "messages": [{"role": "system", "content": "Help."}, user("hi")],
            "tools": [NOW],
            "response_schema": {"type": "array"},
        },
        f"{BOS}Help.{TOOLS_HEAD}{NOW_TEXT}\n</functions>\n"
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "array"}<｜User｜>hi<｜Assistant｜></think>',
    ),
    "developer": (
        {"messages": [user("a"), {"role": "developer", "content": "b"}], "thinking": True},
        f"{BOS}<｜User｜>a<｜Assistant｜></think><｜User｜>\n\n# The user's message is: b<｜Assistant｜><think>",
    ),
    "developer with tools and response format": (
        {
            "messages": [
                {"role": "developer", "content": "b", "tools": [NOW], "response_format": {"type": "string"}},
            ]
        },
        f"{BOS}<｜User｜>{TOOLS_HEAD}{NOW_TEXT}\n</functions>\n"
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "string"}\n\n# The user\'s message is: b<｜Assistant｜></think>',
    ),
    "request tools before a developer": (
        {"messages": [{"role": "developer", "content": "b"}], "tools": [NOW]},
        f"{BOS}{TOOLS_HEAD}{NOW_TEXT}\n</functions>\n<｜User｜>\n\n# The user's message is: b<｜Assistant｜></think>",
    ),
    "earlier developer turns stay": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                user("hi"),
                {"role": "assistant", "content": "Hi.", "reasoning_content": "r"},
                {"role": "developer", "content": "new"},
            ],
            "thinking": True,
        },
        f"{BOS}<｜User｜>\n\n# The user's message is: Be brief.<｜Assistant｜></think>"
        f"<｜User｜>hi<｜Assistant｜></think>Hi.{EOS}<｜User｜>\n\n# The user's message is: new<｜Assistant｜><think>",
    ),
    "one call and its result": (
        {"messages": [user("hi"), calls(call("weather", '{"city": "Köln"}')), result("sunny")]},
        f"{BOS}<｜User｜>hi<｜Assistant｜></think>\n\n"
        "<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result>sunny</result>\n</function_results>\n\n</think>",
    ),
    "text before a call without arguments": (
        {"messages": [user("hi"), calls(call("now", "{}"), content="Let me see."), result("")]},
        f"{BOS}<｜User｜>hi<｜Assistant｜></think>Let me see.\n\n"
        "<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result></result>\n</function_results>\n\n</think>",
    ),
    "values of every kind": (
        {
            "messages": [
                user("hi"),
                calls(
                    call(
                        "f",
                        r"""{"s": "a \"b\"\n<c>", "empty": "", "int": 3, "float": 0.50, "big": 1e3, "yes": true,
                        "none": null, "list": [1, "é", {"k": []}], "object": {"b": {"ü": "\u00fc"}, "a": 2}}""",
                    )
                ),
                result([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]),
            ]
        },
        f"{BOS}<｜User｜>hi<｜Assistant｜></think>\n\n"
        "<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a "b"\n<c></｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="empty" string="true"></｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="int" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="float" string="false">0.5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="big" string="false">1000.0</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="yes" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="none" string="false">null</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="list" string="false">[1, "é", {"k": []}]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="object" string="false">{"b": {"ü": "ü"}, "a": 2}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result>one two</result>\n</function_results>\n\n</think>",
    ),
    "parallel calls, results the other way round": (
        {
            "messages": [
                user("hi"),
                calls(call("weather", {"city": "A"}, "c1"), call("now", "", "c2"), reasoning_content="Both."),
                result("noon", "c2"),
                result("rain", "c1"),
            ],
            "thinking": True,
        },
        f"{BOS}<｜User｜>hi<｜Assistant｜><think>Both.</think>\n\n"
        "<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">A</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result>rain</result>\n<result>noon</result>\n</function_results>\n\n<think>",
    ),
    "a loop of two steps keeps its reasoning, in either spelling": (
        {
            "messages": [
                user("hi"),
                calls(call("now", "{}"), reasoning_content="First the time."),
                result("noon"),
                calls(call("weather", '{"city": "A"}'), content="Now the weather.", reasoning="Then that."),
                result("rain"),
            ],
            "thinking": True,
        },
        f"{BOS}<｜User｜>hi<｜Assistant｜><think>First the time.</think>\n\n"
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result>noon</result>\n</function_results>\n\n"
        "<think>Then that.</think>Now the weather.\n\n"
        "<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">A</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result>rain</result>\n</function_results>\n\n<think>",
    ),
    "a call without its reasoning": (
        {"messages": [user("hi"), calls(call("now", "{}")), result("noon")], "thinking": True},
        f"{BOS}<｜User｜>hi<｜Assistant｜><think></think>\n\n"
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜function_calls>{EOS}\n\n"
        "<function_results>\n<result>noon</result>\n</function_results>\n\n<think>",
    ),
    "the reasoning of an old loop is forgotten": (
        {
            "messages": [
                user("q1"),
                calls(call("now", "{}"), reasoning_content="old"),
                result("noon"),
                {"role": "assistant", "content": "It is noon.", "reasoning_content": "old too"},
                user("q2"),
            ],
            "thinking": True,
        },
        f"{BOS}<｜User｜>q1<｜Assistant｜></think>\n\n"
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜function_calls>{EOS}\n\n"
        f"<function_results>\n<result>noon</result>\n</function_results>\n\n</think>It is noon.{EOS}"
        "<｜User｜>q2<｜Assistant｜><think>",
    ),
    "the user speaks before the tool does": (
        {"messages": [user("q1"), calls(call("now", "{}")), user("never mind")]},
        f"{BOS}<｜User｜>q1<｜Assistant｜></think>\n\n"
        f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>{EOS}'
        "<｜User｜>never mind<｜Assistant｜></think>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prompt(name: str) -> None:
    fields, expected = CASES[name]
    prompt = encode(Conversation(**fields))
    assert prompt.text == expected
    assert prompt.in_reasoning == expected.endswith("<think>")


Q = f"{BOS}<｜User｜>q<｜Assistant｜>"
# (thinking, the beginning, what stands after the question, whether that is inside reasoning)
BEGINNINGS = [
    (False, {"content": "The answer"}, "</think>The answer", False),
    (False, {"content": "The answer", "reasoning_content": "r"}, "</think>The answer", False),
    (False, {"content": "<think>so"}, "</think><think>so", False),
    (True, {"content": "The answer"}, "<think></think>The answer", False),
    (True, {"content": "The answer", "reasoning_content": "r"}, "<think>r</think>The answer", False),
    (True, {"content": "", "reasoning_content": "Let me"}, "<think>Let me", True),
    (True, {"content": None, "reasoning": "Let me"}, "<think>Let me", True),
    (True, {"content": "<think>Let me"}, "<think>Let me", True),
    (True, {"content": "<think>r</think>The"}, "<think>r</think>The", False),
    (True, {"content": "r</think>The"}, "<think>r</think>The", False),
    (True, {"content": ""}, "<think>", True),
    (False, {"content": ""}, "</think>", False),
]


@pytest.mark.parametrize(("thinking", "beginning", "expected", "in_reasoning"), BEGINNINGS)
def test_continued_final_message(thinking: bool, beginning: dict[str, Any], expected: str, in_reasoning: bool) -> None:
    final = {"role": "assistant", **beginning}
    by_field = encode(Conversation([user("q"), final], thinking=thinking, continue_final_message=True))
    assert (by_field.text, by_field.in_reasoning) == (Q + expected, in_reasoning)
    assert encode(Conversation([user("q"), {**final, "prefix": True}], thinking=thinking)) == by_field


def test_an_answer_inside_a_loop_is_continued() -> None:
    messages = [
        user("q"),
        calls(call("now", "{}"), reasoning_content="r"),
        result("noon"),
        {"role": "assistant", "content": "It is", "reasoning_content": "s"},
    ]
    prompt = encode(Conversation(messages, thinking=True, continue_final_message=True))
    assert prompt.text.endswith("<result>noon</result>\n</function_results>\n\n<think>s</think>It is")
    assert not prompt.in_reasoning


def test_a_conversation_that_ends_in_an_answer_has_a_text() -> None:
    messages = [user("q"), {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    read, _ = read_messages(Conversation(messages))
    assert render(read, thinking=True) == f"{BOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}"
    assert render(read, thinking=False) == f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [NOW], "messages": [{"role": "system", "content": "", "tools": [NOW]}, user("a")]}, "tools"),
        (
            {"response_schema": {"a": 1}, "messages": [{"role": "system", "response_format": {"b": 2}}, user("a")]},
            "response_format",
        ),
    ],
)
def test_two_of_a_kind_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(EncodingError, match="in one place") as caught:
        encode(Conversation(**fields))
    assert caught.value.field == f"messages[0].{field}"


def test_unknown_template_arguments_are_refused() -> None:
    with pytest.raises(EncodingError, match="thinking and enable_thinking") as caught:
        encode(Conversation([user("a")], template_kwargs={"clear_thinking": True}))
    assert caught.value.field == "chat_template_kwargs.clear_thinking"
