"""Conversations and their text in the V3.2 chat encoding."""

# ruff: noqa: E501
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from baleen.chat.encoding import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER

DSML = "｜DSML｜"
TOOLS_TEXT = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
%s
</functions>
"""

Message = dict[str, Any]


@dataclass
class Conversation:
    """Messages in the OpenAI form, the answers included.

    answer  what the last turn (tools: the first call) must hold, for `score`
    asked   index of the assistant message that a test asks for
    """

    task: str
    messages: list[Message]
    answer: Any
    thinking: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    schema: dict[str, Any] | None = None
    asked: int = -1

    def __post_init__(self) -> None:
        if self.asked < 0:
            self.asked += len(self.messages)

    @property
    def segments(self) -> list[tuple[str, bool]]:
        return render(self.messages, self.thinking, self.tools, self.schema)

    @property
    def prompt(self) -> str:
        """The text that asks for message `asked`."""
        return "".join(text for text, _ in render(self.messages[: self.asked], self.thinking, self.tools, self.schema))


def render(
    messages: Sequence[Message], thinking: bool, tools: Sequence[dict[str, Any]] = (), schema: Any = None
) -> list[tuple[str, bool]]:
    """The V3.2 chat text in pieces; True: written by the model, so trained on."""
    messages = list(messages)
    if (tools or schema) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ""})
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    out = [(BOS, False)]
    calls = results = 0
    for i, m in enumerate(messages):
        tag = THINK_START if thinking and i >= last_user else THINK_END
        if m["role"] == "system":
            text = m["content"]
            if tools and i == 0:
                text += "\n\n" + TOOLS_TEXT % "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
            if schema and i == 0:
                text += "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
                text += json.dumps(schema, ensure_ascii=False)
            out.append((text, False))
        elif m["role"] == "user":
            out.append((USER + m["content"] + ASSISTANT + tag, False))
        elif m["role"] == "assistant":
            text = m["reasoning_content"] + THINK_END if thinking and i > last_user else ""
            text += m.get("content") or ""
            if m.get("tool_calls"):
                text += call_block(m["tool_calls"])
                calls, results = len(m["tool_calls"]), 0
            out.append((text + EOS, True))
        else:
            results += 1
            text = "\n\n<function_results>" if results == 1 else ""
            text += f"\n<result>{m['content']}</result>"
            if results == calls:
                text += "\n</function_results>\n\n" + tag
            out.append((text, False))
    return out


def call_block(calls: Sequence[dict[str, Any]]) -> str:
    invokes = []
    for call in calls:
        lines = []
        for name, value in call["arguments"].items():
            is_string = isinstance(value, str)
            text = value if is_string else json.dumps(value, ensure_ascii=False)
            flag = "true" if is_string else "false"
            lines.append(f'<{DSML}parameter name="{name}" string="{flag}">{text}</{DSML}parameter>')
        body = "\n".join(lines)
        invokes.append(f'<{DSML}invoke name="{call["name"]}">\n{body}\n</{DSML}invoke>')
    return f"\n\n<{DSML}function_calls>\n" + "\n".join(invokes) + f"\n</{DSML}function_calls>"
