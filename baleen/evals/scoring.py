"""When an answer is right, and how sure an accuracy is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import msgspec

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a server said. `tool_calls` are (name, arguments as JSON text). `error` is set where there is no answer."""

    content: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


def last_number(answer: Answer, expected: Any) -> bool:
    """The last number of the content, commas left out, equals the expected one."""
    found = _NUMBER.findall(answer.content.replace(",", ""))
    return bool(found) and math.isclose(float(found[-1]), float(expected), rel_tol=1e-9)


def last_text(answer: Answer, expected: Any) -> bool:
    """The content ends with the expected text, a full stop aside; a number must not be the tail of another."""
    content, wanted = answer.content.strip().rstrip("."), str(expected).strip().rstrip(".")
    before = content.removesuffix(wanted)
    return content.endswith(wanted) and not (wanted[:1].isalnum() and before[-1:].isalnum())


def same_text(answer: Answer, expected: Any) -> bool:
    """The content is the expected text, white space around it aside; a number may end a sentence."""
    if not isinstance(expected, str):
        return last_number(answer, expected)
    return answer.content.strip() == expected.strip()


def same_json(answer: Answer, expected: Any) -> bool:
    """The content is JSON, with the expected value."""
    try:
        return bool(json.loads(answer.content) == expected)
    except ValueError:
        return False


def same_calls(answer: Answer, expected: Any) -> bool:
    """The calls are the expected ones, in order: names, and arguments as values."""
    try:
        calls = [{"name": name, "arguments": json.loads(arguments)} for name, arguments in answer.tool_calls]
    except ValueError:
        return False
    return calls == expected


def has_all(answer: Answer, expected: Any) -> bool:
    """Every expected string occurs, and the content is not a copy of the whole text."""
    return all(text in answer.content for text in expected) and len(answer.content) < 80 * (len(expected) + 1)


RULES: dict[str, Callable[[Answer, Any], bool]] = {
    "gsm8k": last_number,
    "arithmetic": last_text,
    "tools": same_calls,
    "json": same_json,
    "copy": same_text,
    "needle": has_all,
}


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy of right / total (Wilson's score interval, good near 0 and 1 too)."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.96, right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (middle - half) / scale, (middle + half) / scale
