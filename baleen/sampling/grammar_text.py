"""A `messages.Grammar` -> xgrammar's compiled grammar, or a message that says what is wrong and where."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baleen.messages import Grammar
from baleen.sampling.json_schema import MAX_DEPTH, SchemaError, children, enforceable, pointer
from baleen.sampling.patterns import PatternError, whole

# Spaces and line breaks in a row inside JSON: models were seen to write them without end.
MAX_WHITESPACE = 32
MAX_TEXT = 1 << 20  # characters
_MAX_COMPILERS = 8  # of different sets of usable marks


class GrammarError(ValueError):
    """A grammar that cannot be enforced. The message is for the user, `status` says whose fault it is."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Vocabulary:
    """What the grammars need of the tokenizer.

    tokens         bytes that each id adds to the text, one entry for each row of the embedding; none for padding rows
    marks          the added tokens (special ones, think and tool marks, placeholders): id -> text
    eos_token_ids  allowed where the text may end, and only there
    """

    tokens: Sequence[bytes]
    marks: Mapping[int, str]
    eos_token_ids: Sequence[int]


class GrammarReader:
    """Compiles for one vocabulary; one compilation per thread at a time.

    A mark is not the text it reads as: with its bytes in the vocabulary a JSON string could hold eos or `<think>`. So
    it has no bytes, unless the grammar itself spells it.
    """

    def __init__(self, vocabulary: Vocabulary, max_threads: int = 1) -> None:
        """Raises GrammarError if xgrammar is not installed."""
        self._vocabulary = vocabulary
        self._max_threads = max_threads
        self._xgrammar = load_xgrammar()
        self._compilers: OrderedDict[frozenset[int], Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> Any:
        """An xgrammar.CompiledGrammar. Raises GrammarError."""
        if len(grammar.text) > MAX_TEXT:
            raise GrammarError(f"{grammar.kind}: {len(grammar.text)} characters are too many, at most {MAX_TEXT}")
        if not self._vocabulary.eos_token_ids:
            raise GrammarError("the model has no eos token that could end the text")
        try:
            return _READERS[grammar.kind](self, grammar.text)
        except SchemaError as error:
            raise GrammarError(f"json_schema: at {error.pointer or 'the root'}: {error}") from None
        except RecursionError:
            raise GrammarError(f"{grammar.kind}: nested too deep") from None

    def compiler(self, written: str = "") -> Any:
        """The xgrammar.GrammarCompiler in whose vocabulary the marks in `written` are usable."""
        usable = frozenset(i for i, text in self._vocabulary.marks.items() if written and text in written)
        found = self._compilers.get(usable)
        if found is None:
            marks = self._vocabulary.marks
            tokens = [
                b"" if i in marks and i not in usable else token for i, token in enumerate(self._vocabulary.tokens)
            ]
            info = self._xgrammar.TokenizerInfo(
                tokens, self._xgrammar.VocabType.RAW, stop_token_ids=list(self._vocabulary.eos_token_ids)
            )
            # Without xgrammar's cache: the one above this knows what requests hold.
            found = self._xgrammar.GrammarCompiler(info, max_threads=self._max_threads, cache_enabled=False)
            self._compilers[usable] = found
            if len(self._compilers) > _MAX_COMPILERS:
                self._compilers.popitem(last=False)
        return found

    # ---- one method for each kind ------------------------------------------------------------------------------------

    def _json_schema(self, text: str) -> Any:
        schema = _json(text, "json_schema")
        written = enforceable(schema)
        try:
            return self.compiler().compile_json_schema(json.dumps(written), max_whitespace_cnt=MAX_WHITESPACE)
        except Exception as error:  # RuntimeError as a rule, but that is nowhere promised
            raise SchemaError(self._locate(written), _of_schema(error)) from None

    def _regex(self, text: str) -> Any:
        try:
            self._xgrammar.Grammar.from_regex(text)  # for its messages: the positions are those of the user's text
            return self.compiler(text).compile_regex(whole(text))
        except PatternError as error:
            raise GrammarError(f"regex: {error}") from None
        except Exception as error:
            raise GrammarError(f"regex: {_plain(error)}") from None

    def _ebnf(self, text: str) -> Any:
        try:
            return self.compiler(text).compile_grammar(text)
        except Exception as error:
            raise GrammarError(f"ebnf: {_plain(error)}") from None

    def _structural_tag(self, text: str) -> Any:
        tag = _with_schemas(_json(text, "structural_tag"), "", lambda schema, at: self._checked(schema, at))
        try:
            return self.compiler(json.dumps(tag, ensure_ascii=False)).compile_structural_tag(json.dumps(tag))
        except Exception as error:
            raise GrammarError(f"structural_tag: {_plain(error)}") from None

    def _tools(self, text: str) -> Any:
        """Of tools that say strict, the arguments are instances of their schema or the schema is refused. Of others, as
        far as it can be enforced; of tools that say they are not strict, any.
        """
        asked = json.loads(text)
        tools = []
        for i, tool in enumerate(asked["tools"]):
            function = tool["function"]
            parameters: Any = {"type": "object"}
            if function.get("strict") is not False:
                at = f"/tools/{i}/function/parameters"
                asked_for = parameters | (function.get("parameters") or {})
                parameters = self._checked(asked_for, at, lenient=not function.get("strict"))
            tools.append({"type": "function", "function": {"name": function["name"], "parameters": parameters}})
        answer = None
        if "answer_schema" in asked:
            schema = self._checked(asked["answer_schema"], "/response_format")
            answer = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}
        try:
            choice = asked["tool_choice"] if answer is None else "required"
            tag = tool_call_tag(asked["format"], tools, choice, parallel=asked["parallel_tool_calls"])
            if answer is not None:
                tag["format"] = {"type": "or", "elements": [answer, tag["format"]]}
            return self.compiler(json.dumps(tag, ensure_ascii=False)).compile_structural_tag(json.dumps(tag))
        except Exception as error:
            raise GrammarError(f"tools: {_plain(error)}") from None

    # ---- where ------------------------------------------------------------------------------------------------------

    def _checked(self, schema: Any, at: str, *, lenient: bool = False) -> Any:
        """`enforceable`, and known to compile."""
        try:
            written = enforceable(schema, lenient=lenient)
        except SchemaError as error:
            raise SchemaError(at + error.pointer, str(error)) from None
        problem = self._problem(written, written)
        if problem:
            raise SchemaError(at + self._locate(written), problem)
        return written

    def _problem(self, root: Any, part: Any) -> str:
        """Why a part of a schema does not become a grammar by itself; "" if it does."""
        schema = part
        if part is not root and isinstance(root, dict):
            definitions = root.get("$defs")
            known = definitions if isinstance(definitions, dict) else {}
            schema = {**root, "$defs": {**known, "part of it": part}, "$ref": "#/$defs/part of it"}
        try:
            self._xgrammar.Grammar.from_json_schema(json.dumps(schema))
        except Exception as error:
            return _of_schema(error)
        return ""

    def _locate(self, root: Any) -> str:
        """The pointer of the smallest part that is wrong by itself."""
        found, part = "", root
        for _ in range(MAX_DEPTH):
            wrong = next(((path, child) for path, child in children(part) if self._problem(root, child)), None)
            if wrong is None:
                break
            found, part = pointer(found, wrong[0]), wrong[1]
        return found


_READERS: dict[str, Callable[[GrammarReader, str], Any]] = {
    "json_schema": GrammarReader._json_schema,
    "regex": GrammarReader._regex,
    "ebnf": GrammarReader._ebnf,
    "structural_tag": GrammarReader._structural_tag,
    "tools": GrammarReader._tools,
}


def load_xgrammar() -> Any:
    """The module; it takes a second, so only a process that has a grammar imports it. Raises GrammarError."""
    try:
        import xgrammar
    except ImportError as error:
        raise GrammarError(
            f"grammars, JSON schemas and forced tool calls need xgrammar ({error}): pip install 'baleen-llm[grammar]'"
        ) from None
    return xgrammar


def tool_call_tag(
    call_format: str, tools: Sequence[Mapping[str, Any]], tool_choice: Any, *, parallel: bool
) -> dict[str, Any]:
    """xgrammar's structural tag of an answer with tool calls, as JSON.

    After the calls the answer ends: the V3.2 encoding knows no text behind them. So does free text with a call outside
    of its wrapper, which would pass by `parallel`.
    """
    xgrammar = load_xgrammar()
    model, bare_call = {
        "deepseekv32": ("deepseek_v3_2", "<｜DSML｜invoke"),
        "deepseekv31": ("deepseek_v3_1", "<｜tool▁call▁begin｜>"),
    }[call_format]
    tag: dict[str, Any] = xgrammar.get_model_structural_tag(
        model,
        list(tools),
        tool_choice=tool_choice,
        reasoning="disabled",
        parallel_tool_calls=parallel,
        max_whitespace_cnt=MAX_WHITESPACE,
    ).model_dump()
    if tag["format"]["type"] == "triggered_tags":
        tag["format"]["stop_after_first"] = True
        tag["format"]["excludes"].append(bare_call)
    return tag


def _with_schemas(value: Any, at: str, change: Callable[[Any, str], Any]) -> Any:
    """A structural tag with every JSON schema in it changed."""
    if isinstance(value, list):
        return [_with_schemas(item, f"{at}/{i}", change) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "json_schema" and "json_schema" in value:
        limit = {"max_whitespace_cnt": MAX_WHITESPACE}
        return {**limit, **value, "json_schema": change(value["json_schema"], f"{at}/json_schema")}
    return {key: _with_schemas(item, f"{at}/{key}", change) for key, item in value.items()}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise GrammarError(f"{name}: not JSON: {error}") from None


def _plain(error: Exception) -> str:
    """xgrammar's message without its time, source line and checks."""
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?", "", str(error)).strip()
    return (text[:500] or type(error).__name__).rstrip(".")


def _of_schema(error: Exception) -> str:
    """Without positions, which are those in a rewritten pattern."""
    return re.sub(r" at (position|line) \d+(, column \d+)?", "", _plain(error))
