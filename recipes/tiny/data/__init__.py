"""Training and test data of the bundled model: generated, seeded, endless; one module per family of tasks.

    python -m recipes.tiny.data [TASK ...]        # prints samples and tokens/s

`TASKS` maps a task to its generator: (rng, split, length) -> Conversation. Split "train" and "test" share no sentence
frame and no set of numbers where a task has those (`words.belongs`), and no tool, name or key where it looks things up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from baleen.chat.encoding import EOS, THINK_END
from recipes.tiny.data.arithmetic import arithmetic
from recipes.tiny.data.conversation import Conversation, call_block
from recipes.tiny.data.copying import copy
from recipes.tiny.data.dates import dates
from recipes.tiny.data.json_objects import json_task
from recipes.tiny.data.needle import measured, needle
from recipes.tiny.data.small_talk import chat
from recipes.tiny.data.tool_calls import tools
from recipes.tiny.data.word_problems import word

__all__ = ["MIX", "TASKS", "Conversation", "document", "is_valid_json", "measured", "score"]

Generator = Callable[[random.Random, str, int], Conversation]
TASKS: dict[str, Generator] = {
    "arithmetic": arithmetic, "word": word, "dates": dates, "needle": needle, "copy": copy, "chat": chat,
    "json": json_task, "tools": tools,
}  # fmt: skip
# Shares by number of documents, of short documents; long ones are all `needle`
MIX = {"arithmetic": 18, "word": 24, "dates": 10, "needle": 14, "copy": 11, "chat": 4, "json": 9, "tools": 10}


def document(rng: random.Random, task: str, split: str, length: int) -> Conversation:
    """One conversation; `length` is a wish in tokens that look-up follows."""
    return TASKS[task](rng, split, length)


def score(conversation: Conversation, text: str) -> bool:
    """Whether the generated text (without the prompt, with or without eos) answers the question."""
    text = text.replace(EOS, "")
    if conversation.thinking:
        if THINK_END not in text:
            return False
        text = text.split(THINK_END, 1)[1]
    task, answer = conversation.task.partition(":")[0], conversation.answer
    if task == "tools":
        return text.strip() == (call_block(answer).strip() if answer else text.strip())
    if task == "json":
        try:
            return bool(json.loads(text) == answer)
        except ValueError:
            return False
    if task == "needle":
        return all(str(value) in text for value in answer) and len(text) < 80 * len(answer) + 80
    if task in ("copy", "chat") and isinstance(answer, str):
        return text.strip() == answer.strip()
    last = text.strip().rsplit("\n", 1)[-1].rstrip(".")
    tail = last.rsplit("=", 1)[-1].strip() if "=" in last else last
    return str(answer) in tail.replace(",", " ,").replace("  ", " ").split() or tail.endswith(str(answer))


def is_valid_json(conversation: Conversation, text: str) -> bool:
    """Whether the answer to a json problem parses and has the keys that were asked for."""
    try:
        got = json.loads(text.replace(EOS, "").rpartition(THINK_END)[2])
    except ValueError:
        return False
    wanted = conversation.answer
    rows = [got] if isinstance(wanted, dict) else got
    keys = set(wanted if isinstance(wanted, dict) else wanted[0])
    return isinstance(rows, list) and all(isinstance(row, dict) and set(row) == keys for row in rows)
