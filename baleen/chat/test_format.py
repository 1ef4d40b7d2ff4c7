"""The format that is served, made from the resolved config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baleen.chat.conftest import VOCAB_SIZE, build_tokenizer
from baleen.chat.format import ChatFormat, Conversation, EncodingError, detect
from baleen.config import PUBLISHED, ConfigError
from baleen.flags import default_config

HI = [{"role": "user", "content": "hi"}]
NOW = {"type": "function", "function": {"name": "now", "description": "the time", "parameters": {}}}
BOS = "<｜begin▁of▁sentence｜>"


def served(folder: Path, template: str | None = None, **flags: Any) -> ChatFormat:
    small = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_size": 256, "n_routed_experts": 16}
    raw = next(iter(PUBLISHED.values())) | small | {"vocab_size": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps(raw))
    build_tokenizer().save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return detect(default_config(folder, load_format="dummy", context_length=256, max_total_tokens=4096, **flags))


def test_v32(tmp_path: Path) -> None:
    chat = served(tmp_path)
    assert (chat.name, chat.tool_parser, chat.splits_reasoning) == ("v3.2", "deepseekv32", True)
    assert chat.reason == (
        "chat format v3.2 (DeepSeek's own encoding); tool calls: deepseekv32; reasoning: apart from the content, and "
        "only where a request turns thinking on"
    )
    assert chat.encode(Conversation(HI)).text == f"{BOS}<｜User｜>hi<｜Assistant｜></think>"
    assert "｜DSML｜function_calls" in chat.encode(Conversation(HI, [NOW])).text


def test_speciale_refuses_tools(tmp_path: Path) -> None:
    chat = served(tmp_path, served_model_name="DeepSeek-V3.2-Speciale")
    assert (chat.name, chat.tool_parser) == ("v3.2-speciale", None)
    assert chat.encode(Conversation(HI, thinking=True)).in_reasoning
    own = [{"role": "system", "content": "", "tools": [NOW]}, *HI]
    for conversation in (Conversation(HI, [NOW]), Conversation(own)):
        with pytest.raises(EncodingError, match="Speciale was not trained to call tools") as caught:
            chat.encode(conversation)
        assert caught.value.field == "tools"
    assert served(tmp_path, served_model_name="Speciale", chat_template="deepseekv32").encode(Conversation(HI, [NOW]))


def test_exp_speaks_the_built_in_format_and_not_its_own_template(tmp_path: Path) -> None:
    name = "deepseek-ai/DeepSeek-V3.2-Exp"
    chat = served(tmp_path, served_model_name=name, chat_template="deepseekv31")
    assert (chat.name, chat.tool_parser) == ("v3.2-exp", "deepseekv31")
    assert "built-in deepseekv31.jinja" in chat.reason
    assert "### now\nDescription: the time\n\nParameters: {}" in chat.encode(Conversation(HI, [NOW])).text


def test_templates_of_other_origin(tmp_path: Path) -> None:
    source = "{{ messages[0].content }}<think>{# tool▁call #}"
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    by_path = served(tmp_path, chat_template=str(path))
    assert (by_path.name, by_path.tool_parser) == ("jinja", "deepseekv31")
    assert str(path) in by_path.reason
    own = served(tmp_path, source, chat_template="checkpoint", reasoning_parser="none", tool_call_parser="none")
    assert (own.name, own.tool_parser, own.splits_reasoning) == ("jinja", None, False)
    assert "tool calls: not read; reasoning: left in the content" in own.reason
    for chat in (by_path, own):
        prompt = chat.encode(Conversation(HI))
        assert (prompt.text, prompt.in_reasoning) == ("hi<think>", True)  # what the template opened, the parser closes


def test_broken_templates_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a Jinja template"):
        served(tmp_path, "{% endif %}", chat_template="checkpoint")
    (tmp_path / "mine.jinja").write_text("fine")
    config = default_config(
        tmp_path, load_format="dummy", max_total_tokens=4096, chat_template=str(tmp_path / "mine.jinja")
    )
    (tmp_path / "mine.jinja").unlink()
    with pytest.raises(ConfigError, match=r"^--chat-template: cannot read .*mine\.jinja"):
        detect(config)


def test_what_is_no_text_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    chat = served(tmp_path)
    with pytest.raises(EncodingError, match="lone surrogate") as caught:
        chat.encode(Conversation([*HI, {"role": "user", "content": "\ud800"}]))
    assert caught.value.field == "messages[1].content"
