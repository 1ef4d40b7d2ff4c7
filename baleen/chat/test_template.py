"""The V3.1 format, letter for letter against texts written out by hand; Jinja templates of other origin."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from baleen.chat.conversation import Conversation, EncodingError
from baleen.chat.template import Template
from baleen.chat.test_encoding import NOW, WEATHER, call, calls, result, user
from baleen.config import ConfigError

BUILT_IN = Template((Path(__file__).parent / "deepseekv31.jinja").read_text(), "deepseekv31.jinja")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOLS = """

## Tools
You have access to the following tools:

### weather
Description: Wetter für eine Stadt

Parameters: {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

### now
Description: \n
Parameters: {}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""

# name -> (fields of the Conversation, the prompt)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "question": ({"messages": [user("hi")]}, f"{BOS}<｜User｜>hi<｜Assistant｜></think>"),
    "thinking": ({"messages": [user("hi")], "thinking": True}, f"{BOS}<｜User｜>hi<｜Assistant｜><think>"),
    "systems come first, joined": (
        {
            "messages": [
                {"role": "system", "content": "A"},
                user("q1"),
                {"role": "assistant", "content": "r</think>a1", "reasoning_content": "r"},
                {"role": "system", "content": "B"},
                user("q2"),
            ],
            "thinking": True,
        },
        f"{BOS}A\n\nB<｜User｜>q1<｜Assistant｜></think>a1{EOS}<｜User｜>q2<｜Assistant｜><think>",
    ),
    "developer is system": (
        {"messages": [{"role": "developer", "content": "A"}, user("q")]},
        f"{BOS}A<｜User｜>q<｜Assistant｜></think>",
    ),
    "system alone": ({"messages": [{"role": "system", "content": "A"}]}, f"{BOS}A<｜Assistant｜></think>"),
    "tools": (
        {"messages": [{"role": "system", "content": "A"}, user("q")], "tools": [WEATHER, NOW]},
        f"{BOS}A{TOOLS}<｜User｜>q<｜Assistant｜></think>",
    ),
    "tools without system": (
        {"messages": [user("q")], "tools": [WEATHER, NOW], "thinking": True},
        f"{BOS}{TOOLS}<｜User｜>q<｜Assistant｜><think>",
    ),
    "a turn after the result": (
        {"messages": [user("q"), calls(call("weather", '{"city":"Köln"}')), result("rain")]},
        f"{BOS}<｜User｜>q<｜Assistant｜></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        f'{{"city":"Köln"}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
        "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜Assistant｜></think>",
    ),
    "parallel calls, two steps, thinking": (
        {
            "messages": [
                user("q"),
                calls(call("weather", {"city": "Köln"}, "a"), call("now", "", "b"), content="Wait.", reasoning="r"),
                result("noon", "b"),
                result("rain", "a"),
                calls(call("now", "{}")),
                result("one"),
            ],
            "thinking": True,
        },
        f"{BOS}<｜User｜>q<｜Assistant｜></think>Wait.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Köln"}<｜tool▁call▁end｜>'
        f"<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>"
        "<｜Assistant｜></think><｜tool▁calls▁begin｜>"
        f"<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜><｜Assistant｜><think>",
    ),
    "an old loop": (
        {
            "messages": [
                user("q1"),
                calls(call("now", "{}")),
                result("noon"),
                {"role": "assistant", "content": "It is noon."},
                user("q2"),
            ]
        },
        f"{BOS}<｜User｜>q1<｜Assistant｜></think><｜tool▁calls▁begin｜>"
        f"<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        f"<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜Assistant｜></think>It is noon.{EOS}"
        "<｜User｜>q2<｜Assistant｜></think>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prompt(name: str) -> None:
    fields, expected = CASES[name]
    prompt = BUILT_IN.encode(Conversation(**fields))
    assert prompt.text == expected
    assert prompt.in_reasoning == expected.endswith("<think>")


def test_continued_final_message() -> None:
    messages = [user("q"), {"role": "assistant", "content": "The", "prefix": True}]
    assert BUILT_IN.encode(Conversation(messages)).text == f"{BOS}<｜User｜>q<｜Assistant｜></think>The"
    thinking = BUILT_IN.encode(Conversation(messages, thinking=True))
    assert (thinking.text, thinking.in_reasoning) == (f"{BOS}<｜User｜>q<｜Assistant｜><think></think>The", False)


def render(source: str, **fields: Any) -> str:
    return Template(source, "t.jinja").encode(Conversation(**({"messages": [user("q")]} | fields))).text


def test_both_switches_are_the_one_decision() -> None:
    source = "{{ thinking }} {{ enable_thinking }}"
    assert render(source) == "False False"
    assert render(source, thinking=True) == "True True"


def test_what_transformers_gives_is_there() -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == f"{BOS}{EOS}True"
    assert render("{{ tools | tojson }}", tools=[NOW]) == (
        '[{"type": "function", "function": {"strict": true, "parameters": {}, "name": "now"}}]'
    )
    assert render("{{ {'ü': '<'} | tojson }}{% if tools %}no{% endif %}") == '{"ü": "<"}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% for m in messages %}\n  {% if loop.last %}\nx{% endif %}\n{% endfor %}") == "x"
    assert render("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"


def test_messages_keep_what_templates_read() -> None:
    messages = [
        {"role": "User", "content": [{"type": "text", "text": "a"}], "name": "Ada"},
        calls(call("now", None, "c1")),
        result(None, "c1"),
    ]
    source = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert render(source, messages=messages) == (
        '{"role": "user", "content": "a", "name": "Ada"}'
        '{"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": '
        '{"name": "now", "arguments": "{}"}}]}'
        '{"role": "tool", "tool_call_id": "c1", "content": ""}'
    )
    asked = [{"role": "developer", "content": "A"}, user("q")]
    assert render("{{ messages[0].role }}", messages=asked) == "system"
    assert render("{{ messages[0].role }}{# developer #}", messages=asked) == "developer"


def test_template_arguments() -> None:
    assert render("{{ lang }}", template_kwargs={"lang": "de"}) == "de"
    for name, problem in (("long", "does not read it"), ("messages", "the server sets it"), ("thinking", "sets it")):
        with pytest.raises(EncodingError, match=problem) as caught:
            render("{{ lang }}{{ messages }}{{ thinking }}", template_kwargs={name: "x"})
        assert caught.value.field == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str, problem: str) -> None:
    with pytest.raises(EncodingError, match=problem) as caught:
        render(source)
    assert caught.value.field == "messages"


def test_a_broken_template_ends_the_start() -> None:
    with pytest.raises(ConfigError, match=r"^t\.jinja: not a Jinja template: "):
        Template("{% if %}", "t.jinja")


@pytest.mark.parametrize("field", ["tools", "response_format"])
def test_a_message_brings_nothing_of_its_own(field: str) -> None:
    value = {"tools": [NOW], "response_format": {"type": "object"}}[field]
    with pytest.raises(EncodingError, match="from the request alone") as caught:
        BUILT_IN.encode(Conversation([{"role": "system", "content": "A", field: value}, user("q")]))
    assert caught.value.field == f"messages[0].{field}"


def test_something_must_be_asked() -> None:
    for messages in ([user("q"), {"role": "assistant", "content": "a"}], [user("q"), calls(call("now", "{}"))]):
        with pytest.raises(EncodingError, match="append a"):
            BUILT_IN.encode(Conversation(messages))
    final = {"role": "assistant", "content": "a", "prefix": True}
    with pytest.raises(EncodingError, match="one to answer") as caught:
        BUILT_IN.encode(Conversation([final]))
    assert caught.value.field == "messages[0].role"
