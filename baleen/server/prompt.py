"""A chat request -> the ids of its prompt, the same for every route that has messages."""

from __future__ import annotations

from dataclasses import dataclass

from baleen.chat.conversation import Conversation
from baleen.chat.encoding import THINK_START
from baleen.server.generation import Service
from baleen.server.protocol import ChatRequest

# Of chat_template_kwargs: what the request's own switches are made of; no template sees these as they came.
_SWITCHES = {
    "thinking", "enable_thinking", "reasoning_effort", "force_nonempty_content", "spaces_between_special_tokens",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """in_reasoning   the ids end inside an open `<think>`, where the parser must start too"""

    input_ids: list[int]
    in_reasoning: bool


async def encode_chat(service: Service, chat: ChatRequest) -> ChatPrompt:
    """Ids that the client gave itself are taken as they are. Raises EncodingError, ApiError."""
    if chat.input_ids is not None:
        service.check_ids(chat.input_ids, "input_ids")
        return ChatPrompt(chat.input_ids, service.tokenizer.token_text(chat.input_ids[-1]) == THINK_START)
    template_kwargs = {
        name: value
        for name, value in (chat.chat_template_kwargs or {}).items()
        if name not in _SWITCHES and value is not None
    }
    prompt = service.chat_format.encode(
        Conversation(
            messages=chat.messages,
            tools=chat.tools or (),
            thinking=chat.wants_thinking,
            response_schema=chat.response_schema,
            continue_final_message=bool(chat.continue_final_message),
            template_kwargs=template_kwargs,
        )
    )
    return ChatPrompt(await service.encode(prompt.text, "messages"), prompt.in_reasoning)
