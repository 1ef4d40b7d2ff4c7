"""An agent's loop over HTTP: two tools, calls in parallel, results, thinking kept inside the loop, a final answer, and
a second question. Through every API that agents speak and their own clients, streamed and not.

A scripted engine says what a model would. What it was asked must be, to the token, the conversation in the V3.2 format
as written out below by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import anthropic
import pytest

from baleen.messages import GenerateRequest, unpack_ids
from baleen.server.conftest import Server, running_server

SYSTEM = "You are a guide."
QUESTION = "Can I go out in Oslo?"
THANKS = "Thanks!"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS},
    {"name": "get_events", "description": "What is on", "parameters": {"type": "object", "properties": {}}},
]
RESULTS = {
    ("get_weather", '{"city": "Oslo", "days": 2}'): "rain, 9°C",
    ("get_events", "{}"): '["ski museum"]',
    ("get_weather", '{"city": "Bergen"}'): "sun",
}

# ---- what the model says, step by step
SAID = [
    """I need the weather and the events.</think>Let me look.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="get_events">
</｜DSML｜invoke>
</｜DSML｜function_calls>""",
    """Rain. Is Bergen better?</think>

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Bergen</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>""",
    "Bergen it is.</think>Go to Bergen: sun.",
    "Be polite.</think>You are welcome.",
]

# ---- what it must have been asked
BEGIN = """<｜begin▁of▁sentence｜>You are a guide.

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
{"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
{"name": "get_events", "description": "What is on", "parameters": {"type": "object", "properties": {}}}
</functions>
<｜User｜>Can I go out in Oslo?<｜Assistant｜>"""  # noqa: E501
FIRST_CALLS = """Let me look.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="get_events">

</｜DSML｜invoke>
</｜DSML｜function_calls><｜end▁of▁sentence｜>

<function_results>
<result>rain, 9°C</result>
<result>["ski museum"]</result>
</function_results>

"""
SECOND_CALL = """

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Bergen</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls><｜end▁of▁sentence｜>

<function_results>
<result>sun</result>
</function_results>

"""
ASKED = [
    BEGIN + "<think>",
    BEGIN + "<think>I need the weather and the events.</think>" + FIRST_CALLS + "<think>",
    BEGIN
    + "<think>I need the weather and the events.</think>"
    + FIRST_CALLS
    + "<think>Rain. Is Bergen better?</think>"
    + SECOND_CALL
    + "<think>",
    # The next question ends the loop: its reasoning is forgotten, what was said and done is not.
    BEGIN
    + "</think>"
    + FIRST_CALLS
    + "</think>"
    + SECOND_CALL
    + "</think>Go to Bergen: sun.<｜end▁of▁sentence｜><｜User｜>Thanks!<｜Assistant｜><think>",
]

Step = tuple[str, list[tuple[str, str, str]]]  # (text, calls as (id, name, arguments))


class ChatAgent:
    """Chat completions: assistant messages go back with their reasoning_content."""

    def __init__(self, server: Server, stream: bool) -> None:
        self.client = server.openai()
        self.stream = stream
        self.messages: list[Any] = [{"role": "system", "content": SYSTEM}]

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def step(self) -> Step:
        answer = self.client.chat.completions.create(
            model="tiny-whale",
            messages=self.messages,
            tools=[{"type": "function", "function": tool} for tool in TOOLS],
            stream=self.stream,
            extra_body={"chat_template_kwargs": {"thinking": True}},
        )
        if self.stream:
            message = self._joined(answer)
        else:
            assert answer.choices[0].finish_reason == ("tool_calls" if answer.choices[0].message.tool_calls else "stop")
            message = answer.choices[0].message.to_dict()
        self.messages.append(message)
        calls = message.get("tool_calls") or []
        return message["content"], [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls]

    @staticmethod
    def _joined(chunks: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
        calls: dict[int, dict[str, Any]] = {}
        reasons = []
        for chunk in chunks:
            (choice,) = chunk.choices
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for part in choice.delta.tool_calls or ():
                new = {"id": part.id, "type": part.type, "function": {"name": part.function.name, "arguments": ""}}
                call = calls.setdefault(part.index, new)
                call["function"]["arguments"] += part.function.arguments or ""
            reasons.append(choice.finish_reason)
        assert [reason for reason in reasons if reason] == ["tool_calls" if calls else "stop"]
        return message | ({"tool_calls": [calls[i] for i in range(len(calls))]} if calls else {})

    def give(self, call_id: str, result: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": result})


class ResponsesAgent:
    """The Responses API, stateless: all output items go back."""

    extra: ClassVar[dict[str, Any]] = {"store": False}

    def __init__(self, server: Server, stream: bool) -> None:
        self.client = server.openai()
        self.stream = stream
        self.items: list[Any] = []
        self.more = self.extra

    def ask(self, text: str) -> None:
        self.items.append({"role": "user", "content": text})

    def step(self) -> Step:
        request = {
            "model": "tiny-whale",
            "instructions": SYSTEM,
            "input": self.items,
            "tools": [{"type": "function", "strict": None} | tool for tool in TOOLS],
            "reasoning": {"effort": "high"},
            **self.more,
        }
        if self.stream:
            with self.client.responses.stream(**request) as events:
                response = events.get_final_response()
        else:
            response = self.client.responses.create(**request)
        assert response.status == "completed"
        self.remember(response)
        calls = [item for item in response.output if item.type == "function_call"]
        return response.output_text, [(item.call_id, item.name, item.arguments) for item in calls]

    def remember(self, response: Any) -> None:
        self.items += [item.to_dict() for item in response.output]

    def give(self, call_id: str, result: str) -> None:
        self.items.append({"type": "function_call_output", "call_id": call_id, "output": result})


class EncryptedResponsesAgent(ResponsesAgent):
    """As clients do that keep of the reasoning what they cannot read, alone."""

    extra: ClassVar = {"store": False, "include": ["reasoning.encrypted_content"]}

    def remember(self, response: Any) -> None:
        for item in response.output:
            kept = item.to_dict()
            if item.type == "reasoning":
                assert kept.pop("content")
            self.items.append(kept)


class SummaryResponsesAgent(ResponsesAgent):
    extra: ClassVar = {"store": False, "reasoning": {"effort": "high", "summary": "auto"}}

    def remember(self, response: Any) -> None:
        assert response.output[0].summary[0].text
        super().remember(response)


class StoredResponsesAgent(ResponsesAgent):
    """The server remembers; only what is new goes back."""

    extra: ClassVar[dict[str, Any]] = {}

    def remember(self, response: Any) -> None:
        self.items = []
        self.more = {"previous_response_id": response.id}


class ReferencesResponsesAgent(ResponsesAgent):
    """The server remembers items, and the client names them."""

    extra: ClassVar[dict[str, Any]] = {}

    def remember(self, response: Any) -> None:
        self.items += [{"type": "item_reference", "id": item.id} for item in response.output]


class AnthropicAgent:
    """Anthropic's messages: the answer's blocks go back, results in one user message."""

    thinking: ClassVar[dict[str, Any]] = {"type": "adaptive"}

    def __init__(self, server: Server, stream: bool) -> None:
        self.client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=20)
        self.stream = stream
        self.messages: list[Any] = []

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def step(self) -> Step:
        request: dict[str, Any] = {
            "model": "tiny-whale",
            "max_tokens": 2000,
            "system": SYSTEM,
            "messages": self.messages,
            "tools": [{**tool, "input_schema": tool["parameters"]} for tool in TOOLS],
            "thinking": self.thinking,
        }
        for tool in request["tools"]:
            del tool["parameters"]
        if self.stream:
            with self.client.messages.stream(**request) as events:
                message = events.get_final_message()
        else:
            message = self.client.messages.create(**request)
        calls = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == ("tool_use" if calls else "end_turn")
        self.messages.append({"role": "assistant", "content": [block.to_dict() for block in message.content]})
        text = "".join(block.text for block in message.content if block.type == "text")
        return text, [(block.id, block.name, json.dumps(block.input)) for block in calls]

    def give(self, call_id: str, result: str) -> None:
        block = {"type": "tool_result", "tool_use_id": call_id, "content": result}
        if self.messages[-1]["role"] == "user":
            self.messages[-1]["content"].append(block)
        else:
            self.messages.append({"role": "user", "content": [block]})


class OmittedAnthropicAgent(AnthropicAgent):
    """The thinking is not shown, and comes back in its signature."""

    thinking: ClassVar = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("agent")
    with running_server(folder, context_length=8192, max_total_tokens=32768) as server:
        yield server


def answer(agent: Any) -> tuple[list[list[tuple[str, str]]], str]:
    """Run the loop until the model answers: the calls of each step, and the answer."""
    made = []
    while True:
        text, calls = agent.step()
        if not calls:
            return made, text
        made.append([(name, arguments) for _, name, arguments in calls])
        assert len({call_id for call_id, _, _ in calls}) == len(calls)
        for call_id, name, arguments in calls:
            agent.give(call_id, RESULTS[name, arguments])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "agent_class",
    [
        ChatAgent,
        ResponsesAgent,
        EncryptedResponsesAgent,
        SummaryResponsesAgent,
        StoredResponsesAgent,
        ReferencesResponsesAgent,
        AnthropicAgent,
        OmittedAnthropicAgent,
    ],
)
@pytest.mark.parametrize("per_step", [1, 7])
def test_agent_loop(server: Server, agent_class: Callable[..., Any], stream: bool, per_step: int) -> None:
    said = iter(SAID)

    def reply(request: GenerateRequest) -> list[int]:
        return server.tokenizer.encode(next(said))

    script = server.play(reply=reply, per_step=per_step)
    agent = agent_class(server, stream)
    agent.ask(QUESTION)
    made, text = answer(agent)
    assert made == [
        [("get_weather", '{"city": "Oslo", "days": 2}'), ("get_events", "{}")],
        [("get_weather", '{"city": "Bergen"}')],
    ]
    assert text == "Go to Bergen: sun."
    agent.ask(THANKS)
    assert answer(agent) == ([], "You are welcome.")
    asked = [unpack_ids(request.input_ids) for request in script.requests]
    assert asked == [server.tokenizer.encode(prompt) for prompt in ASKED]
