"""The offline engine's chat: the model's format, tools, and marks that are text."""

from __future__ import annotations

from pathlib import Path

import pytest

from baleen import LLM, SamplingParams
from baleen.chat.conversation import EncodingError
from baleen.model.random_checkpoint import build_random_checkpoint

HI = [{"role": "user", "content": "hi"}]
NOW = {"type": "function", "function": {"name": "now", "parameters": {}}}


def test_chat_shows_the_marks_of_tool_calls(tmp_path: Path) -> None:
    folder = build_random_checkpoint(tmp_path / "tiny", size="tiny")
    with LLM(str(folder), context_length=2048, max_total_tokens=4096) as llm:
        (mark,) = llm.tokenizer.encode("｜DSML｜")
        always = SamplingParams(max_new_tokens=2, logit_bias=((mark, 100.0),))
        plain = llm.chat(HI, always)
        with_tools = llm.chat(HI, always, tools=[NOW], thinking=True)
        assert plain.text == with_tools.text == "｜DSML｜｜DSML｜"
        assert llm.generate("hi", always)[0].text == ""  # a special token
        assert plain.num_prompt_tokens == len("hi") + 4  # bos, user, assistant, </think>
        assert with_tools.num_prompt_tokens > 1000
        with pytest.raises(EncodingError, match="needs content"):
            llm.chat([{"role": "user"}])
