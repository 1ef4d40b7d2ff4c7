"""Which chat format a checkpoint gets: from its files, its name, the flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baleen.checkpoint_variant import choose_chat, read_template
from baleen.config import AUTO, ConfigError


def folder(
    path: Path, *, dsml: bool = False, escaped: bool = False, template: str | None = None, name: str = "model"
) -> str:
    """A checkpoint as far as its chat format shows."""
    path = path / name
    path.mkdir()
    tokens = [{"content": "<｜User｜>"}, *([{"content": "｜DSML｜"}] if dsml else [])]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}, ensure_ascii=escaped))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return str(path)


def chosen(
    path: str, *names: str, template: str = AUTO, tool_parser: str = AUTO, refused: str = ""
) -> tuple[str, str, str]:
    """(template, parser, why the template)"""
    choices, refusals = choose_chat(template, tool_parser, path, path, names)
    by_key = {key: (value, reason) for key, value, reason in choices}
    assert by_key["server.reasoning_parser"][0] == "deepseek-v3"
    assert refused in "".join(refusals) if refused else not refusals
    return by_key["server.chat_template"][0], by_key["server.tool_call_parser"][0], by_key["server.chat_template"][1]


@pytest.mark.parametrize("escaped", [False, True])
def test_the_tokenizer_of_v32_is_known_by_its_mark(tmp_path: Path, escaped: bool) -> None:
    """Whatever the folder is called, and though somebody has put a chat template into it."""
    path = folder(tmp_path, dsml=True, escaped=escaped, template="x", name="DeepSeek-V3.2-Exp")
    template, parser, reason = chosen(path, "my-model")
    assert (template, parser) == ("deepseekv32", "deepseekv32")
    assert reason == "the tokenizer has ｜DSML｜, as DeepSeek-V3.2's; its chat template is not used"


def test_exp_is_known_by_its_template(tmp_path: Path) -> None:
    template, parser, reason = chosen(folder(tmp_path, template="x"), "my-model")
    assert (template, parser) == ("deepseekv31", "deepseekv31")
    assert "as DeepSeek-V3.2-Exp" in reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseekv31"),
        ("deepseek-v32-exp-fp8", "deepseekv31"),
        ("/models/DeepSeek-V3.1", "deepseekv31"),
        ("deepseek-ai/DeepSeek-V3.2", "deepseekv32"),
        ("nvidia/DeepSeek-V3.2-NVFP4", "deepseekv32"),
        ("DeepSeek-V3.2-Experts-merged", "deepseekv32"),
        ("DeepSeek-V3.2-Exp/run-7", "deepseekv32"),  # a folder's parents are not its name
        ("deepseek-ai/DeepSeek-V3.2-Speciale", "deepseekv32-speciale"),
        ("whale-speciale-fp8", "deepseekv32-speciale"),
        ("/hub/models--deepseek-ai--DeepSeek-V3.2-Speciale/snapshots/0123abcd", "deepseekv32-speciale"),
    ],
)
def test_names_decide_where_the_files_do_not(tmp_path: Path, name: str, expected: str) -> None:
    assert chosen(folder(tmp_path), name)[0] == expected
    assert chosen("", name)[0] == expected  # not on this machine
    assert chosen("", "my-model", name)[0] == expected  # any of the names


def test_speciale_is_a_name_for_the_files_of_v32(tmp_path: Path) -> None:
    path = folder(tmp_path, dsml=True, name="DeepSeek-V3.2-Speciale")
    template, parser, reason = chosen(path, "served")
    assert (template, parser) == ("deepseekv32-speciale", "none")
    assert reason == "V3.2-Speciale by the name DeepSeek-V3.2-Speciale"
    assert chosen(path, "served", template="deepseekv32")[:2] == ("deepseekv32", "deepseekv32")
    with pytest.raises(ConfigError, match=r"not trained to call tools.*--chat-template deepseekv32"):
        chosen(path, "served", tool_parser="deepseekv32")


def test_the_format_follows_the_parser(tmp_path: Path) -> None:
    """So that the prompt asks for the calls that will be read."""
    exp, v32 = folder(tmp_path, template="x", name="exp"), folder(tmp_path, dsml=True, name="v32")
    assert chosen(exp, tool_parser="deepseekv32")[0] == "deepseekv32"
    assert chosen(v32, tool_parser="deepseekv31")[0] == "deepseekv31"
    assert chosen(exp, tool_parser="deepseekv31")[0] == "deepseekv31"
    assert chosen(v32, tool_parser="none")[0] == "deepseekv32"


def test_formats_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"deepseekv31 does not read .* deepseekv32; leave it out"):
        chosen("", template="deepseekv32", tool_parser="deepseekv31")
    with pytest.raises(ConfigError, match="write none"):
        chosen("", template="deepseekv32-speciale", tool_parser="deepseekv32")
    assert chosen("", template="deepseekv32", tool_parser="none")[0] == "deepseekv32"


@pytest.mark.parametrize(
    ("text", "parser"),
    [("<｜DSML｜invoke", "deepseekv32"), ("<｜tool▁calls▁begin｜>", "deepseekv31"), ("{{ messages }}", "none")],
)
def test_a_template_of_ones_own_shows_its_parser(tmp_path: Path, text: str, parser: str) -> None:
    (tmp_path / "mine.jinja").write_text(text)
    path = str(tmp_path / "mine.jinja")
    assert chosen("", template=path)[:2] == (path, parser)
    inside = folder(tmp_path, dsml=True, template=text)
    assert chosen(inside, template="checkpoint")[:2] == ("checkpoint", parser)


def test_templates_that_are_not_there_are_refused(tmp_path: Path) -> None:
    chosen("", template="./tool_chat_template_deepseekv32.jinja", refused="is built in: --chat-template deepseekv31")
    chosen("", template="deepseek", refused="no such file; give a Jinja file, or one of deepseekv32, ")
    chosen(folder(tmp_path), template="checkpoint", refused="the checkpoint has no chat template")


def test_where_a_checkpoint_keeps_its_template(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = tmp_path / "tokenizer_config.json"
    assert read_template(str(tmp_path)) is None
    config.write_text(json.dumps({"chat_template": several}))
    assert read_template(str(tmp_path)) == "d"
    config.write_text(json.dumps({"chat_template": "c"}))
    assert read_template(str(tmp_path)) == "c"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert read_template(str(tmp_path)) == "j"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_template(str(tmp_path)) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    for broken in ("{", "[]", '{"chat_template": [1]}'):
        (tmp_path / "chat_template.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"chat_template\.json: cannot be read"):
            read_template(str(tmp_path))
