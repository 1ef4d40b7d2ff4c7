"""Every conversation that has no prompt is refused by the name of the field, with the fix."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.chat.conversation import Conversation, EncodingError, Prompt, check_text, read_messages
from baleen.chat.encoding import encode
from baleen.chat.test_encoding import NOW, call, calls, result, user

ASSISTANT = {"role": "assistant", "content": "b"}


def turn(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"} | fields]


def called(arguments: Any) -> list[dict[str, Any]]:
    return [user("a"), calls(call("now", arguments)), result("noon")]


BAD_MESSAGES: list[tuple[list[Any], str, str]] = [
    ([], "messages", "must not be empty"),
    (["hi"], "messages[0]", "must be an object, not str"),
    ([{"content": "a"}], "messages[0].role", "None is not a role"),
    (turn(role="robot"), "messages[0].role", "the roles are system, developer, user, assistant, tool"),
    (turn(role=["user"]), "messages[0].role", "not a role"),
    (turn(role="function"), "messages[0].role", "send the result as role 'tool'"),
    (turn(role="latest_reminder"), "messages[0].role", "another model family"),
    ([{"role": "user"}], "messages[0].content", "needs content"),
    (turn(content=3), "messages[0].content", "not int"),
    ([{"role": "developer", "content": ""}], "messages[0].content", "a developer message needs content"),
    (turn(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content[0].type", "not 'image_url'"),
    (turn(content=[{"type": "text", "text": "a"}, "b"]), "messages[0].content[1].type", "not 'str'"),
    (turn(content=[{"type": "text"}]), "messages[0].content[0].text", "as a string"),
    (turn(tool_calls=[call("f", "{}")]), "messages[0].tool_calls", "only an assistant"),
    (turn(tools=[NOW]), "messages[0].tools", "only a system or developer"),
    (turn(response_format={"type": "object"}), "messages[0].response_format", "only a system or developer"),
    ([{"role": "system", "tools": "now"}, user("a")], "messages[0].tools", "a list of tools"),
    ([{"role": "system", "tools": [{}]}, user("a")], "messages[0].tools[0].function", "must be an object"),
    (turn(tool_call_id=3), "messages[0].tool_call_id", "must be a string"),
    (turn(prefix=1), "messages[0].prefix", "true or false"),
    (turn(prefix=True), "messages[0].prefix", "only the last message, from the assistant"),
    ([{**ASSISTANT, "prefix": True}, user("a")], "messages[0].prefix", "only the last message"),
    ([{**ASSISTANT, "function_call": {"name": "f"}}, user("a")], "messages[0].function_call", "send tool_calls"),
    ([{**ASSISTANT, "audio": {"id": "x"}}, user("a")], "messages[0].audio", "only text"),
    ([{**ASSISTANT, "refusal": "No."}, user("a")], "messages[0].refusal", "as content"),
    ([{**ASSISTANT, "reasoning_content": 1}, user("a")], "messages[0].reasoning_content", "must be a string"),
    ([{**ASSISTANT, "reasoning": ["r"]}, user("a")], "messages[0].reasoning", "must be a string"),
    ([{**ASSISTANT, "tool_calls": {}}, user("a")], "messages[0].tool_calls", "a list of tool calls"),
    ([user("a"), calls({"id": "x"})], "messages[1].tool_calls[0].function", "name and arguments"),
    ([user("a"), calls(call("", "{}"))], "messages[1].tool_calls[0].function.name", "the function's name"),
    ([user("a"), calls({**call("f", "{}"), "id": 1})], "messages[1].tool_calls[0].id", "must be a string"),
    (called("{"), "messages[1].tool_calls[0].function.arguments", "must be valid JSON"),
    (called('{"a": NaN}'), "messages[1].tool_calls[0].function.arguments", "NaN is not JSON"),
    (called("[" * 100_000), "messages[1].tool_calls[0].function.arguments", "must be valid JSON"),
    (called('{"a": ' + "9" * 5000 + "}"), "messages[1].tool_calls[0].function.arguments", "must be valid JSON"),
    (called("[1]"), "messages[1].tool_calls[0].function.arguments", "must be a JSON object, not list"),
    (called([1]), "messages[1].tool_calls[0].function.arguments", "must be a JSON object, not list"),
    (called(r'{"a": "\ud800"}'), "messages[1].tool_calls[0].function.arguments", "lone surrogate"),
    ([result("noon"), user("a")], "messages[0].role", "must follow the assistant message"),
    ([user("a"), result("noon")], "messages[1].role", "must follow the assistant message"),
    ([user("a"), ASSISTANT, result("noon")], "messages[2].role", "must follow the assistant message"),
    ([*called("{}"), user("b"), result("one")], "messages[4].role", "must follow the assistant message"),
    ([*called("{}"), result("one")], "messages[3]", "one result too many: there are 1 tool calls"),
    (
        [user("a"), calls(call("f", "{}", "c1"), call("g", "{}", "c2"), call("h", "{}")), result("x", "c2")],
        "messages[2].tool_call_id",
        "3 tool calls but 1 results; missing: c1, h",
    ),
    ([{"role": "system", "content": "s"}], "messages[0].role", "append a user message"),
    ([user("a"), ASSISTANT], "messages[1].role", "or send continue_final_message: true"),
    ([user("a"), {"role": "system", "content": "s"}], "messages[1].role", "append a user message"),
    ([user("a"), calls(call("f", "{}"))], "messages[1].tool_calls", "append a message of role tool"),
]


@pytest.mark.parametrize(("messages", "field", "message"), BAD_MESSAGES)
@pytest.mark.parametrize("thinking", [False, True])
def test_messages_are_refused_by_name(messages: list[Any], field: str, message: str, thinking: bool) -> None:
    with pytest.raises(EncodingError) as caught:
        encode(Conversation(messages, thinking=thinking))
    assert caught.value.field == field
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ([{"type": "custom", "custom": {}}], "tools[0].type"),
        (["now"], "tools[0].type"),
        ([NOW, {"type": "function"}], "tools[1].function"),
        ([{"function": {"description": "d"}}], "tools[0].function.name"),
        ([{"function": {"name": ""}}], "tools[0].function.name"),
        ("now", "tools"),
    ],
)
def test_tools_are_refused_by_name(tools: Any, field: str) -> None:
    with pytest.raises(EncodingError) as caught:
        encode(Conversation([user("a")], tools))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([user("a")], "continue_final_message", "it is from user"),
        ([ASSISTANT], "messages[0].role", "there must be one to answer"),
        ([{"role": "system", "content": "s"}, ASSISTANT], "messages[1].role", "there must be one to answer"),
        ([user("a"), ASSISTANT, ASSISTANT], "messages[2].role", "there must be one to answer"),
        ([user("a"), calls(call("f", "{}"), content="b")], "messages[1].tool_calls", "nothing to continue"),
        (
            [user("a"), {"role": "assistant", "reasoning_content": "r"}],
            "messages[1].reasoning_content",
            "in thinking mode only",
        ),
    ],
)
def test_what_cannot_be_continued(messages: list[Any], field: str, message: str) -> None:
    with pytest.raises(EncodingError) as caught:
        encode(Conversation(messages, continue_final_message=True))
    assert caught.value.field == field
    assert message in str(caught.value)


def order_of(*ids: str | None, asked: tuple[str | None, ...]) -> list[str]:
    messages = [user("a"), calls(*(call("f", "{}", i) for i in asked)), *(result(str(n), i) for n, i in enumerate(ids))]
    read, _ = read_messages(Conversation(messages))
    return [message.content for message in read if message.role == "tool"]


def test_results_go_to_their_calls() -> None:
    assert order_of("b", "c", "a", asked=("a", "b", "c")) == ["2", "0", "1"]
    # The ids do not say which is which: as they came.
    assert order_of("b", "x", asked=("a", "b")) == ["0", "1"]
    assert order_of("b", "b", asked=("a", "b")) == ["0", "1"]
    assert order_of(None, None, asked=("a", "b")) == ["0", "1"]
    assert order_of("b", "a", asked=(None, None)) == ["0", "1"]
    assert order_of("a", "a", asked=("a", "a")) == ["0", "1"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=4), st.data())
def test_no_result_is_lost(asked: list[str], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.sampled_from([*"abcd", None]), min_size=len(asked), max_size=len(asked)))
    assert sorted(order_of(*ids, asked=tuple(asked))) == [str(n) for n in range(len(asked))]


def test_offered_tools_are_the_requests_and_the_messages() -> None:
    own = {"role": "system", "content": "", "tools": [NOW]}
    assert Conversation([own, user("a")]).offered_tools == [NOW]
    assert Conversation([user("a")], [NOW]).offered_tools == [NOW]
    assert Conversation([user("a"), {"role": "system", "tools": None}]).offered_tools == []


@pytest.mark.parametrize(
    ("conversation", "field"),
    [
        (Conversation([user("ok"), user("\ud800")]), "messages[1].content"),
        (Conversation([user([{"type": "text", "text": "a\udfff"}])]), "messages[0].content[0].text"),
        (
            Conversation([user("ok")], [{"function": {"name": "f", "description": "\ud800"}}]),
            "tools[0].function.description",
        ),
        (Conversation([user("ok")], [{"function": {"name": "f", "\ud800": 1}}]), "tools[0].function"),
        (Conversation([user("ok")], response_schema={"title": ["\ud800"]}), "response_schema.title[0]"),
        (Conversation([user("ok")], template_kwargs={"lang": "\ud800"}), "messages"),
    ],
)
def test_half_a_surrogate_pair_is_not_text(conversation: Conversation, field: str) -> None:
    with pytest.raises(EncodingError, match="lone surrogate") as caught:
        check_text(conversation, "a prompt with it: \ud800")
    assert caught.value.field == field
    assert json.dumps(str(caught.value), ensure_ascii=False).encode()
    check_text(conversation, "a prompt without it")


def test_a_deep_object_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(EncodingError, match="nested too deeply") as caught:
        encode(Conversation([user("a")], [{"function": {"name": "f", "parameters": deep}}]))
    assert caught.value.field == "tools"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["a", "text", "user", "tool", "{}", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "id", "type", "text"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(["content", "tool_calls", "tools", "prefix"]), json_values), max_size=4),
    st.lists(st.sampled_from(["user", "assistant", "tool", "system", "developer", None]), min_size=4, max_size=4),
    st.booleans(),
)
def test_anything_is_a_prompt_or_a_named_error(
    messages: list[dict[str, Any]], roles: list[str | None], thinking: bool
) -> None:
    messages = [{"role": role, **message} for role, message in zip(roles, messages)]
    field = "messages"
    try:
        assert isinstance(encode(Conversation(messages, thinking=thinking)), Prompt)
    except EncodingError as error:
        field = error.field
    assert field.startswith(("messages", "tools"))
