"""How DeepSeek-V3.2 models write tool calls: the tags of both formats, as patterns that match a beginning of a tag too.

deepseekv32 (V3.2)       <DSML function_calls> <DSML invoke name="f"> body </DSML invoke> ... </DSML function_calls>
                         body: <DSML parameter name="a" string="true">text</DSML parameter> ..., or a JSON object
deepseekv31 (V3.2-Exp)   <calls begin> <call begin>f<sep>JSON object<call end> ... <calls end>
"""

from __future__ import annotations

from dataclasses import dataclass

import regex  # its partial matching says whether more text could make a tag of what is there

from baleen.chat.encoding import DSML, THINK_END

SPACE = " \t\r\n"  # that may stand between tags, and around a JSON value


@dataclass(frozen=True)
class CallFormat:
    """The tags of one format.

    newlines    how many line ends before a tag belong to it, at most
    call        begins a call: the block's opening tag, which may be missing, and all up to where its arguments begin.
                Groups: name, and one of empty (a whole call without arguments), json (the brace that opens the
                arguments), key and string (of the first parameter)
    parameter   begins a further parameter; groups key and string ("true", "false" or missing)
    value_end   ends a parameter
    call_end    ends a call
    block_end   ends a block
    """

    newlines: int
    call: regex.Pattern[str]
    parameter: regex.Pattern[str]
    value_end: regex.Pattern[str]
    call_end: regex.Pattern[str]
    block_end: regex.Pattern[str]


_S = f"[{SPACE}]*+"  # possessive: what follows is never a space, so giving one back would be in vain
_S1 = f"[{SPACE}]++"
_PARAMETER = rf'<{DSML}parameter{_S1}name="(?P<key>[^"\n]*)"(?:{_S1}string="(?P<string>true|false)")?{_S}>'
_NEVER = regex.compile("(?!)")

_DEEPSEEK_V32 = CallFormat(
    newlines=2,
    call=regex.compile(
        rf'(?:<{DSML}function_calls>{_S})?<{DSML}invoke{_S1}name="(?P<name>[^"\n]*)"{_S}'
        rf"(?:(?P<empty>/>|>{_S}</{DSML}invoke>)|>{_S}(?:(?P<json>\{{)|{_PARAMETER}))"
    ),
    parameter=regex.compile(_PARAMETER),
    value_end=regex.compile(f"</{DSML}parameter>"),
    call_end=regex.compile(f"</{DSML}invoke>"),
    block_end=regex.compile(f"</{DSML}function_calls>"),
)

_DEEPSEEK_V31 = CallFormat(
    newlines=0,
    call=regex.compile(
        rf"(?:<｜tool▁calls▁begin｜>{_S})?<｜tool▁call▁begin｜>{_S}(?P<name>[^<{SPACE}]+){_S}<｜tool▁sep｜>{_S}"
        r"(?P<json>\{)"
    ),
    parameter=_NEVER,
    value_end=_NEVER,
    call_end=regex.compile("<｜tool▁call▁end｜>"),
    block_end=regex.compile("<｜tool▁calls▁end｜>"),
)

CALL_FORMATS = {"deepseekv32": _DEEPSEEK_V32, "deepseekv31": _DEEPSEEK_V31}
REASONING_END = regex.compile(THINK_END)
