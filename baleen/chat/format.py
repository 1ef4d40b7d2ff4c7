"""The chat format of the served model: one object that every route uses, made from the resolved config.

Which format that is, `checkpoint_variant` and the flags have decided. Here it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baleen.chat import encoding
from baleen.chat.conversation import Conversation, EncodingError, Prompt, check_text
from baleen.checkpoint_variant import CHECKPOINT, read_template
from baleen.config import Config, ConfigError

__all__ = ["ChatFormat", "Conversation", "EncodingError", "Prompt", "detect"]

ToolParser = Literal["deepseekv32", "deepseekv31"]
_NAMES = {"deepseekv32": "v3.2", "deepseekv32-speciale": "v3.2-speciale", "deepseekv31": "v3.2-exp"}
_PARSERS: dict[str, ToolParser | None] = {"deepseekv32": "deepseekv32", "deepseekv31": "deepseekv31", "none": None}


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become prompts, and what reads the answers.

    name               v3.2 | v3.2-speciale | v3.2-exp | jinja
    tool_parser        None: calls are not looked for
    splits_reasoning   reasoning is told from content
    reason             one line for the start of the server
    """

    name: str
    tool_parser: ToolParser | None
    splits_reasoning: bool
    reason: str
    _encode: Callable[[Conversation], Prompt]

    def encode(self, conversation: Conversation) -> Prompt:
        """The prompt that asks for the next answer. Raises EncodingError."""
        if self.name == "v3.2-speciale" and conversation.offered_tools:
            raise EncodingError(
                "tools",
                "DeepSeek-V3.2-Speciale was not trained to call tools; leave them out, or ask DeepSeek-V3.2"
                " (a model that is only called Speciale: start the server with --chat-template deepseekv32)",
            )
        prompt = self._encode(conversation)
        check_text(conversation, prompt.text)
        return prompt


def detect(config: Config) -> ChatFormat:
    """The format of `config`'s model. Raises ConfigError for a template that cannot be used."""
    template = config.server.chat_template
    tool_parser = _PARSERS[config.server.tool_call_parser]
    name = _NAMES.get(template, "jinja")
    if name in ("v3.2", "v3.2-speciale"):
        origin, encode = "DeepSeek's own encoding", encoding.encode
    else:
        from baleen.chat.template import Template

        source, origin = _template_source(template, config.load.tokenizer_path)
        encode = Template(source, origin).encode
    splits = config.server.reasoning_parser != "none"
    reason = (
        f"chat format {name} ({origin}); tool calls: {tool_parser or 'not read'}; "
        f"reasoning: {'apart from the content' if splits else 'left in the content'}, "
        "and only where a request turns thinking on"
    )
    return ChatFormat(name, tool_parser, splits, reason, encode)


def _template_source(template: str, tokenizer_folder: str) -> tuple[str, str]:
    """A Jinja template's text, and where it comes from."""
    if template == CHECKPOINT:
        source = read_template(tokenizer_folder)
        if source is None:
            raise ConfigError("--chat-template", f"{tokenizer_folder} has no chat template", "leave it out")
        return source, f"the chat template of {tokenizer_folder}"
    built_in = Path(__file__).parent / f"{template}.jinja"
    path = built_in if template in _NAMES else Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8"), f"built-in {built_in.name}" if path == built_in else str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--chat-template", f"cannot read {path} ({error})", "give a Jinja file") from None
