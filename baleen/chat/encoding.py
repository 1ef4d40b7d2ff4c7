r"""The DeepSeek-V3.2 chat format: a conversation -> the prompt text the model was trained on.

    <bos>{system}<|User|>{question}<|Assistant|></think>{answer}<eos><|User|>{question}<|Assistant|><think>

A user turn already opens the answer: `<think>` if the model is to think (only after the last user turn, in thinking
mode), else `</think>`. Reasoning before the last user turn is never sent again; reasoning after it is, so that a model
amid its tool calls remembers why it made them. Tools and the answer's schema stand in the first system message, calls
and results in the assistant's turn:

    ...<|Assistant|><think>{reasoning}</think>{text}\n\n<DSML function_calls>...</DSML function_calls><eos>
    \n\n<function_results>\n<result>...</result>\n</function_results>\n\n<think>{reasoning}</think>{answer}<eos>

Where the official encoder would fail or lose something, this one differs:
- thinking, with a developer turn before the last user turn: it stays as a user turn does (officially an error);
- thinking, with an assistant turn of the current loop that has neither reasoning nor calls: its reasoning is empty
  (officially an error);
- results are matched to their calls by `tool_call_id` where that is possible (`conversation.read_messages`);
- results that are missing, and an end that leaves nothing to answer, are errors.

Source: encoding/encoding_dsv32.py of the DeepSeek-V3.2 model repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from baleen.chat.conversation import (
    Conversation,
    EncodingError,
    Message,
    Prompt,
    check_answerable,
    read_messages,
    to_json,
)

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"

_TOOLS = f"""\n\n## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the \
user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK_START}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
"""
_TOOLS_END = "\n</functions>\n"
_RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def encode(conversation: Conversation) -> Prompt:
    """The prompt that asks for the next answer. Raises EncodingError."""
    if conversation.template_kwargs:
        name = next(iter(conversation.template_kwargs))
        raise EncodingError(f"chat_template_kwargs.{name}", "this chat format knows thinking and enable_thinking")
    messages, final = read_messages(conversation)
    check_answerable(messages, final)
    text = render(_with_offers(messages, conversation), thinking=conversation.thinking)
    return with_beginning(text, final)


def render(messages: Sequence[Message], *, thinking: bool) -> str:
    """The text of any conversation, also one that ends in an answer. Raises EncodingError."""
    last_user = max((i for i, m in enumerate(messages) if m.role in ("user", "developer")), default=-1)
    parts = [BOS]
    for i, message in enumerate(messages):
        may_think = thinking and i >= last_user
        if message.role == "system":
            parts.append(message.content + _offers(message))
        elif message.role == "user":
            parts.append(USER + message.content + ASSISTANT + _think_tag(may_think))
        elif message.role == "developer":
            body = f"{_offers(message)}\n\n# The user's message is: {message.content}"
            parts.append(USER + body + ASSISTANT + _think_tag(may_think))
        elif message.role == "assistant":
            reasoning = message.reasoning + THINK_END if may_think else ""
            parts.append(reasoning + message.content + _calls(message) + EOS)
        else:
            first = messages[i - 1].role != "tool"
            last = i + 1 == len(messages) or messages[i + 1].role != "tool"
            parts.append("\n\n<function_results>" if first else "")
            parts.append(f"\n<result>{message.content}</result>")
            parts.append(f"\n</function_results>\n\n{_think_tag(may_think)}" if last else "")
    return "".join(parts)


def with_beginning(text: str, final: Message | None) -> Prompt:
    """`text`, which may end in a think tag, and the beginning of the answer that `final` gives.

    Content is never put inside reasoning: where the prompt thinks and `final` has content alone, the reasoning is
    empty. Content that opens or closes the reasoning by tags of its own is taken as it is; without thinking it always
    is.
    """
    opened = text.endswith(THINK_START)
    if final is None or not (final.content or final.reasoning):
        return Prompt(text, opened)
    content, reasoning = final.content, final.reasoning
    if not opened:
        if not content:
            problem = "reasoning is continued in thinking mode only; the request has thinking off"
            raise EncodingError(f"{final.place}.reasoning_content", problem)
        return Prompt(text + content, False)
    if reasoning:
        return Prompt(text + reasoning + (THINK_END + content if content else ""), not content)
    if content.startswith(THINK_START) or THINK_END in content:
        return Prompt(text + content.removeprefix(THINK_START), THINK_END not in content)
    return Prompt(text + THINK_END + content, False)


def _with_offers(messages: list[Message], conversation: Conversation) -> list[Message]:
    """The request's tools and schema go to the first system message, which is made if there is none."""
    if not (conversation.tools or conversation.response_schema):
        return messages
    first, rest = Message(-1, "system"), messages
    if messages[0].role == "system":
        first, rest = messages[0], messages[1:]
    if conversation.tools and first.tools:
        raise EncodingError(f"{first.place}.tools", "the request has tools too: give them in one place")
    if conversation.response_schema and first.response_format:
        raise EncodingError(f"{first.place}.response_format", "the request has one too: give it in one place")
    offers = replace(
        first,
        tools=tuple(conversation.tools) or first.tools,
        response_format=conversation.response_schema or first.response_format,
    )
    return [offers, *rest]


def _offers(message: Message) -> str:
    """The tools and the response format that stand in a system or developer message."""
    text = ""
    if message.tools:
        functions = [to_json(tool["function"], "tools") for tool in message.tools]
        text += _TOOLS + "\n".join(functions) + _TOOLS_END
    if message.response_format:
        text += _RESPONSE_FORMAT + to_json(message.response_format, "response_format")
    return text


def _calls(message: Message) -> str:
    if not message.calls:
        return ""
    invokes = []
    for call in message.calls:
        parameters = "\n".join(_parameter(name, value, message.place) for name, value in call.arguments.items())
        invokes.append(f'<{DSML}invoke name="{call.name}">\n{parameters}\n</{DSML}invoke>')
    return f"\n\n<{DSML}function_calls>\n" + "\n".join(invokes) + f"\n</{DSML}function_calls>"


def _parameter(name: str, value: Any, place: str) -> str:
    """Strings as they are, everything else as JSON."""
    is_text = isinstance(value, str)
    text = value if is_text else to_json(value, f"{place}.tool_calls")
    return f'<{DSML}parameter name="{name}" string="{"true" if is_text else "false"}">{text}</{DSML}parameter>'


def _think_tag(thinks: bool) -> str:
    return THINK_START if thinks else THINK_END
