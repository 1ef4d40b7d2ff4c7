"""The model's text -> what the user gets, as it arrives: reasoning up to `</think>`, content after it."""

from __future__ import annotations

from typing import NamedTuple

from baleen.chat.encoding import THINK_END


class Delta(NamedTuple):
    """What a piece of text adds to the parts of the answer."""

    reasoning: str = ""
    content: str = ""


class ThinkSplitter:
    """Splits at the first `</think>`; both halves are kept as they are. The same parts however the text is chunked.

    thinking   the prompt ended in `<think>`; otherwise all text is content, tags included
    """

    def __init__(self, *, thinking: bool) -> None:
        self.reasoning = thinking
        self._held = ""  # the end of the text so far that may be the start of the tag

    def push(self, text: str) -> Delta:
        if not self.reasoning:
            return Delta(content=text)
        text = self._held + text
        before, tag, after = text.partition(THINK_END)
        if tag:
            self.reasoning = False
            self._held = ""
            return Delta(before, after)
        held = next(n for n in range(len(THINK_END) - 1, -1, -1) if text.endswith(THINK_END[:n]))
        self._held = text[len(text) - held :]
        return Delta(reasoning=text[: len(text) - held])

    def finish(self) -> Delta:
        """The rest, when no more text comes: reasoning that was cut off stays reasoning."""
        rest, self._held = self._held, ""
        return Delta(reasoning=rest)
