"""What the output may be: a JSON schema, a regular expression, a grammar; and the tools that may be called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pydantic_core
from pydantic import Field, WithJsonSchema, field_validator

from baleen.messages import Grammar
from baleen.server.errors import bad_request
from baleen.server.fields import RequestModel, SamplingFields, parse_part

# ---- tools ----------------------------------------------------------------------------------------------------------


class Function(RequestModel):
    """`parameters` is a JSON schema; the engine refuses what its grammar library cannot compile, when it has to."""

    refused: ClassVar = {"defer_loading": (False,)}
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _takes_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise ValueError(f"must be the schema of an object, of type 'object', not {value['type']!r}")
        return value


class Tool(RequestModel):
    type: Literal["function"] = "function"
    function: Function

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        self.function.check(prefix + "function.")


@dataclass(frozen=True)
class ToolUse:
    """What a request's `tools`, `tool_choice` and `parallel_tool_calls` come to.

    shown      the tools in the prompt, as the client wrote them
    callable   those of them that may be called now: none, all, or the chosen
    choice     as in `messages.Grammar`; "none": no tool may be called
    enforced   a grammar must see to it; else the model is free, as with "auto" and all tools
    """

    shown: tuple[Mapping[str, Any], ...] = ()
    callable: tuple[Mapping[str, Any], ...] = ()
    choice: str | dict[str, Any] = "none"
    parallel: bool = True
    enforced: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.callable)

    def grammar(self, tool_parser: str, answer: Grammar | None = None) -> Grammar:
        """The format of calls that `tool_parser` reads. With "auto", `answer` is what a text is that calls nothing."""
        text = {
            "format": tool_parser,
            "tools": self.callable,
            "tool_choice": self.choice,
            "parallel_tool_calls": self.parallel,
        }
        if answer is not None and self.choice == "auto":
            text["answer_schema"] = json.loads(answer.text)
        return Grammar(kind="tools", text=json.dumps(text, ensure_ascii=False))


def tool_use(tools: Mapping[str, Any], choice: Any, parallel: bool | None) -> ToolUse:
    """`tools`: field -> a tool as the client wrote it. Raises ApiError 400 naming the field."""
    shown = tuple(tools.values())
    strict = False
    names: set[str] = set()
    for field, tool in tools.items():
        function = parse_part(Tool, tool, f"{field}.").function
        if function.name in names:
            raise bad_request(f"{field}.function.name", f"there are two tools named {function.name!r}")
        names.add(function.name)
        strict = strict or bool(function.strict)
    mode, chosen = _read_choice(choice if choice is not None else "auto" if shown else "none")
    if not shown:
        if mode == "required":
            raise bad_request("tool_choice", "there are no tools to choose from; send `tools`")
        return ToolUse()
    if mode == "none":
        return ToolUse(shown)
    for name in chosen or ():
        if name not in names:
            raise bad_request("tool_choice", f"tool {name!r} is not among the tools: {', '.join(sorted(names))}")
    callable_now = tuple(tool for tool in shown if chosen is None or tool["function"]["name"] in chosen)
    one_named = isinstance(choice, dict) and choice["type"] == "function"
    return ToolUse(
        shown,
        callable_now,
        {"type": "function", "function": {"name": next(iter(chosen or ()))}} if one_named else mode,
        parallel is not False,
        enforced=mode == "required" or chosen is not None or strict or parallel is False,
    )


def _read_choice(choice: Any) -> tuple[str, set[str] | None]:
    """(none | auto | required, the names of the only tools that may be called or None for all). Raises ApiError 400."""
    if choice in ("none", "auto", "required"):
        return choice, None
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            return "required", {name}
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]}}:
            names = set()
            for i, tool in enumerate(tools):
                match tool:
                    case {"type": "function", "function": {"name": str(name)}}:
                        names.add(name)
                    case _:
                        message = 'must be {"type": "function", "function": {"name": ...}}'
                        raise bad_request(f"tool_choice.allowed_tools.tools[{i}]", message)
            if not names:
                raise bad_request("tool_choice.allowed_tools.tools", "must not be empty")
            return mode, names
    message = (
        'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
    )
    raise bad_request("tool_choice", message)


# ---- the form of the text -------------------------------------------------------------------------------------------


class JsonSchema(RequestModel):
    """OpenAI's wrapping of a schema. It is enforced whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """`schema` at the top is the same as inside `json_schema`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """Of type json_schema: the schema. Raises ApiError 400 if there is none."""
        if self.type != "json_schema":
            return None
        inner = self.json_schema.schema_ if self.json_schema is not None else None
        schema = inner if inner is not None else self.schema_
        if schema is None:
            raise bad_request("response_format.json_schema.schema", "type json_schema needs a schema")
        return schema

    def grammar(self) -> Grammar | None:
        """Raises ApiError 400."""
        if self.type == "structural_tag":
            return _structural_tag({"type": self.type, **(self.model_extra or {})}, "response_format")
        schema = {"type": "object"} if self.type == "json_object" else self.schema_asked
        return None if schema is None else Grammar(kind="json_schema", text=_dump(schema))


# A JSON object or its text. `constraints` checks it: pydantic's complaint about a union would not name the field.
JsonObject = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})]


class ConstraintFields(SamplingFields):
    """Sampling under a constraint, of which a request has at most one."""

    json_schema: JsonObject = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    ebnf: Annotated[str, Field(min_length=1)] | None = None
    structural_tag: JsonObject = None

    def constraints(self, prefix: str = "") -> dict[str, Grammar]:
        """The field's name -> what it asks for. Raises ApiError 400."""
        found: dict[str, Grammar] = {}
        if self.json_schema is not None:
            schema = _object(self.json_schema, prefix + "json_schema")
            found["json_schema"] = Grammar(kind="json_schema", text=_dump(schema))
        if self.regex is not None:
            found["regex"] = Grammar(kind="regex", text=self.regex)
        if self.ebnf is not None:
            found["ebnf"] = Grammar(kind="ebnf", text=self.ebnf)
        if self.structural_tag is not None:
            name = prefix + "structural_tag"
            found["structural_tag"] = _structural_tag(_object(self.structural_tag, name), name)
        return found

    def constraint(self, prefix: str = "") -> tuple[str | None, Grammar | None]:
        """The one constraint and the field that asks for it. Raises ApiError 400 if there are several."""
        found = self.constraints(prefix)
        if len(found) > 1:
            first, second = list(found)[:2]
            raise bad_request(prefix + second, f"cannot be combined with {prefix}{first}: the output can follow one")
        return next(iter(found.items()), (None, None))

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        self.constraint(prefix)


def _object(value: Any, param: str) -> dict[str, Any]:
    """A JSON object, given as such or as its text. Raises ApiError 400."""
    if isinstance(value, str):
        try:
            value = pydantic_core.from_json(value)  # refuses what is nested too deep
        except ValueError as error:
            raise bad_request(param, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(param, f"must be a JSON object, or its text, not {value!r:.40}")
    return value


def _structural_tag(tag: dict[str, Any], param: str) -> Grammar:
    """xgrammar's {"type", "format"}, or SGLang's older {"structures": [{"begin", "schema", "end"}], "triggers"}."""
    if "structures" in tag:
        match tag:
            case {"structures": [*structures], "triggers": [*triggers]}:
                pass
            case _:
                raise bad_request(param, "needs the lists `structures` and `triggers`, or xgrammar's `format`")
        tags = []
        for i, structure in enumerate(structures):
            match structure:
                case {"begin": str(begin), "end": str(end)}:
                    content = {"type": "json_schema", "json_schema": structure.get("schema") or {}}
                    tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
                case _:
                    raise bad_request(f"{param}.structures[{i}]", "needs the strings `begin` and `end`")
        tag = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}
    elif "format" not in tag:
        raise bad_request(param, "needs xgrammar's `format`, or `structures` and `triggers`")
    return Grammar(kind="structural_tag", text=_dump(tag))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
