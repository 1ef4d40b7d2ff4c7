"""Which of the family a checkpoint is, as far as the chat format goes: V3.2, V3.2-Speciale or V3.2-Exp.

config.json is the same for all three, so:

1. a name with "speciale" (--served-model-name, --model, or the folder's own): Speciale, whose files are V3.2's;
2. a tokenizer with the token ｜DSML｜: V3.2, whatever the folder is called and whatever template somebody put in it;
3. a chat template, or a name like "V3.2-Exp" or "V3.1": V3.2-Exp, which speaks V3.1's format;
4. otherwise V3.2.

What is wrong about a renamed folder is put right by --chat-template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from baleen.config import AUTO, ConfigError

CHECKPOINT = "checkpoint"
# --chat-template -> the parser of its tool calls
BUILT_IN = {"deepseekv32": "deepseekv32", "deepseekv32-speciale": "none", "deepseekv31": "deepseekv31"}
_PUBLIC_FILES = {
    "tool_chat_template_deepseekv31.jinja": "deepseekv31",
    "tool_chat_template_deepseekv32.jinja": "deepseekv31",  # V3.2-Exp's, in spite of its name
}
_DSML = "｜DSML｜"


def choose_chat(
    template: str, tool_parser: str, folder: str, tokenizer_folder: str, names: Iterable[str]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """What --chat-template, --tool-call-parser and --reasoning-parser are where they are `AUTO`.

    folder, tokenizer_folder   "" or a folder that does not exist: nothing is known of the files
    names                      what the model is called
    returns                    ("section.field", value, reason) of each, and refusals as in `flags.Resolution`
    Raises:                    ConfigError for a template and a parser that do not belong together.
    """
    reason = ""
    if template == AUTO:
        template, reason = _detect(folder, tokenizer_folder, names)
        if tool_parser in BUILT_IN and template == "deepseekv32-speciale":
            problem = f"{tool_parser} on V3.2-Speciale, which was not trained to call tools"
            fix = f"leave it out, or have the model treated as another: --chat-template {tool_parser}"
            raise ConfigError("--tool-call-parser", problem, fix)
        if tool_parser in BUILT_IN and tool_parser != template:
            template, reason = tool_parser, "the format that --tool-call-parser reads"
    refusals: list[str] = []
    if template in BUILT_IN:
        own = BUILT_IN[template]
        own_reason = f"the tool calls of {template}" if own != "none" else "V3.2-Speciale was not trained to call tools"
        if tool_parser not in (AUTO, "none", own):
            problem = f"{tool_parser} does not read the tool calls of --chat-template {template}"
            raise ConfigError("--tool-call-parser", problem, f"leave it out, or write {own}")
    else:
        source, refusals = _custom_source(template, tokenizer_folder)
        own = "deepseekv32" if _DSML in source else "deepseekv31" if "tool▁call" in source else "none"
        own_reason = f"the chat template shows {own if own != 'none' else 'no'} tool calls"
    choices = [
        ("server.chat_template", template, reason),
        ("server.tool_call_parser", own, own_reason),
        ("server.reasoning_parser", "deepseek-v3", "reasoning ends at </think>"),
    ]
    return choices, refusals


def read_template(folder: str) -> str | None:
    """The chat template of a checkpoint, None if it has none. Raises ConfigError for files that cannot be read."""
    path = Path(folder) / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, list):  # several: transformers takes the one called default
                found = {entry["name"]: entry["template"] for entry in found}.get("default")
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(str(path), f"cannot be read ({error!r})", "fetch it again") from None
        if isinstance(found, str):
            return found
    return None


def _detect(folder: str, tokenizer_folder: str, names: Iterable[str]) -> tuple[str, str]:
    called = [part for name in (*names, folder) for part in _own_names(name)]
    for name in called:
        if "speciale" in name.lower():
            return "deepseekv32-speciale", f"V3.2-Speciale by the name {name}"
    has_template = bool(folder) and read_template(tokenizer_folder) is not None
    if folder and _has_dsml(Path(tokenizer_folder) / "tokenizer.json"):
        unused = "; its chat template is not used" if has_template else ""
        return "deepseekv32", f"the tokenizer has {_DSML}, as DeepSeek-V3.2's{unused}"
    if has_template:
        return "deepseekv31", f"a chat template and no {_DSML} in the tokenizer, as DeepSeek-V3.2-Exp"
    for name in called:
        if re.search(r"v3\.?2[-_.]?exp(?![a-z])|v3\.?1(?!\d)", name.lower()):
            return "deepseekv31", f"V3.2-Exp by the name {name}"
    return "deepseekv32", "nothing says otherwise: DeepSeek-V3.2"


def _own_names(name: str) -> list[str]:
    """The last part of a path or hub name, and the repository's where the hub's cache keeps it."""
    parts = Path(name).parts
    return [*parts[-1:], *(part for part in parts if part.startswith("models--"))]


def _has_dsml(path: Path) -> bool:
    """Whether the token is spelled in the file, as it is or with JSON's escapes."""
    if not path.is_file():
        return False
    data = path.read_bytes()
    return _DSML.encode() in data or json.dumps(_DSML).strip('"').encode() in data


def _custom_source(template: str, folder: str) -> tuple[str, list[str]]:
    """The text of a Jinja template that is not built in, and what is wrong with it."""
    if template == CHECKPOINT:
        source = read_template(folder)
        missing = f"--chat-template {CHECKPOINT}: the checkpoint has no chat template; leave it out"
        return source or "", [] if source is not None else [missing]
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8"), []
    fix = f"give a Jinja file, or one of {', '.join((*BUILT_IN, CHECKPOINT))}"
    if path.name in _PUBLIC_FILES:
        fix = f"the same format is built in: --chat-template {_PUBLIC_FILES[path.name]}"
    return "", [f"--chat-template {template}: there is no such file; {fix}"]
