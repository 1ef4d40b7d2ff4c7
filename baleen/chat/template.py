"""Chat formats written as Jinja templates: the built-in one of V3.1 and V3.2-Exp, a checkpoint's own, a user's file.

A template gets what `transformers` gives it: messages, tools, add_generation_prompt, bos_token, eos_token, the function
raise_exception, strftime_now, and the filter tojson that leaves characters as they are. Both `thinking` and
`enable_thinking` are set, to the one decision that the request's parser knows too.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import jinja2.sandbox

from baleen.chat.conversation import Conversation, EncodingError, Message, Prompt, check_answerable, read_messages
from baleen.chat.encoding import BOS, EOS, with_beginning
from baleen.config import ConfigError

_SET_HERE = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "thinking", "enable_thinking")


class Template:
    """A compiled template. Raises ConfigError naming `origin`, the file it came from, for one that is broken."""

    def __init__(self, source: str, origin: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._reads = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(origin, f"not a Jinja template: {error}", "fix it, or name another") from None
        self._knows_developer = "developer" in source

    def encode(self, conversation: Conversation) -> Prompt:
        """The prompt that asks for the next answer. Raises EncodingError, also for what the template itself refuses."""
        for name in conversation.template_kwargs:
            if name in _SET_HERE or name not in self._reads:
                problem = "the server sets it" if name in _SET_HERE else "the chat template does not read it"
                raise EncodingError(f"chat_template_kwargs.{name}", problem)
        messages, final = read_messages(conversation)
        asking = [message for message in messages if message.role != "system"]
        if asking or not messages:
            check_answerable(asking, final)
        variables = {
            **conversation.template_kwargs,
            "messages": [self._variables(message, conversation) for message in messages],
            "tools": list(conversation.tools) or None,
            "add_generation_prompt": True,
            "bos_token": BOS,
            "eos_token": EOS,
            "thinking": conversation.thinking,
            "enable_thinking": conversation.thinking,
        }
        try:
            text = self._template.render(variables)
        except Exception as error:  # a template is a program: it may raise anything
            raise EncodingError("messages", f"the chat template refused them: {error}") from None
        return with_beginning(text, final)

    def _variables(self, message: Message, conversation: Conversation) -> dict[str, Any]:
        """The client's object, with what is known of it in the one form that templates expect."""
        for name in ("tools", "response_format"):
            if getattr(message, name):
                raise EncodingError(f"{message.place}.{name}", "this chat format takes it from the request alone")
        role = "system" if message.role == "developer" and not self._knows_developer else message.role
        variables = {**conversation.messages[message.index], "role": role, "content": message.content}
        variables.pop("tool_calls", None)
        if message.reasoning:
            variables["reasoning_content"] = message.reasoning
        if message.calls:
            variables["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
                for call in message.calls
            ]
        return variables


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
