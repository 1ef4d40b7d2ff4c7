"""JSON schemas for xgrammar 0.2.8, which silently drops many keywords and is stricter than meant with others.

`enforceable` writes a schema so that every text of its grammar is an instance, and names what it cannot enforce.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from baleen.sampling.patterns import PatternError, anywhere

MAX_DEPTH = 200  # of nested subschemas; compiling takes seconds from here on
MAX_MULTIPLE_OF = 1024  # xgrammar counts the remainder in states

_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRING = ("minLength", "maxLength", "pattern", "format")
_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems")
_OBJECT = (
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "unevaluatedProperties",
)  # fmt: skip
_FAMILIES = {"number": _NUMBER, "string": _STRING, "array": _ARRAY, "object": _OBJECT}
_VALUES = ("enum", "const")
_COMBINERS = ("$ref", "anyOf", "oneOf", "allOf")
_ASSERTIONS = ("type", *_VALUES, *_NUMBER, *_STRING, *_ARRAY, *_OBJECT)
_UNENFORCED = (
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "contains", "uniqueItems", "$dynamicRef",
    "$recursiveRef",
)  # fmt: skip
_TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
    "number": (int, float),
}


class SchemaError(ValueError):
    """`pointer` is the JSON pointer of the part that is wrong, "" for the whole."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(message)
        self.pointer = pointer


def enforceable(schema: Any, *, lenient: bool = False) -> Any:
    """An equivalent or narrower schema of which xgrammar enforces every keyword. The argument stays as it is.

    lenient  leave out what cannot be enforced instead of raising

    Raises SchemaError.
    """
    return _Rewriting(schema, lenient).rewrite(schema, "", 0)


def children(schema: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The subschemas right below a schema, each with its path."""
    if not isinstance(schema, Mapping):
        return
    for key in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(schema.get(key), Mapping):
            for name, child in schema[key].items():
                yield (key, name), child
    for key in ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties"):
        if key in schema:
            yield (key,), schema[key]
    for key in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            for i, child in enumerate(schema[key]):
                yield (key, str(i)), child


def pointer(base: str, path: tuple[str, ...]) -> str:
    """`base` and a path below it as a JSON pointer."""
    return base + "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path)


class _Rewriting:
    def __init__(self, root: Any, lenient: bool) -> None:
        self._root = root
        self._lenient = lenient

    def rewrite(self, schema: Any, at: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise SchemaError(at, f"nested deeper than {MAX_DEPTH} schemas")
        if not isinstance(schema, dict):
            return schema
        for keyword in _UNENFORCED:
            if schema.get(keyword) not in (None, False):
                self._refuse(at, f"`{keyword}` cannot be enforced; leave it out")
        # Beside them xgrammar takes an object without further keywords for an empty one.
        changed = {key: value for key, value in schema.items() if key not in _UNENFORCED}
        changed = self._combined(changed, at)
        if not any(key in changed for key in _COMBINERS):
            changed = self._asserted(changed, at)
        below = list(children(changed))
        for key in {path[0] for path, _ in below if len(path) > 1}:
            changed[key] = changed[key].copy()
        for path, child in below:
            place = changed[path[0]] if len(path) > 1 else changed
            last: Any = int(path[-1]) if isinstance(place, list) else path[-1]
            place[last] = self.rewrite(child, pointer(at, path), depth + 1)
        return changed

    def _refuse(self, at: str, message: str) -> None:
        if not self._lenient:
            raise SchemaError(at, message)

    # ---- $ref, anyOf, oneOf, allOf: xgrammar takes the first and ignores all beside it -------------------------------

    def _combined(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        found = [key for key in _COMBINERS if key in schema]
        if not found:
            return schema
        first, beside = found[0], found[1:] + [key for key in _ASSERTIONS if key in schema]
        if beside == ["type"] and first in ("anyOf", "oneOf") and isinstance(schema[first], list):
            kind = schema.pop("type")
            schema[first] = [
                {"type": kind, **part} if isinstance(part, dict) and not _has(part, (*_COMBINERS, *_VALUES)) else part
                for part in schema[first]
            ]
            beside = ["type"] if any(_types(part) - _types({"type": kind}) for part in schema[first]) else []
        if beside:
            self._refuse(at, f"`{first}` beside `{beside[0]}` cannot be enforced; write them into one schema")
        if first == "$ref" and not re.match(r"#(/|$)", str(schema["$ref"])):
            self._refuse(at, f"`$ref` to {schema['$ref']!r} cannot be followed; it must start with '#/'")
        if first == "allOf" and isinstance(schema["allOf"], list):
            parts = schema["allOf"]
            if len(parts) == 1 and isinstance(parts[0], dict):
                del schema["allOf"]
                return self._combined({**schema, **parts[0]}, at)
            self._refuse(at, "`allOf` of several schemas cannot be enforced; write them into one")
        if first == "oneOf" and isinstance(schema["oneOf"], list):
            for a, b in combinations(range(len(schema["oneOf"])), 2):
                if not self._exclusive(schema["oneOf"][a], schema["oneOf"][b]):
                    self._refuse(at, f"`oneOf`: schemas {a} and {b} may both hold; make them exclusive or use `anyOf`")
            schema["anyOf"] = schema.pop("oneOf")
        return schema

    def _exclusive(self, a: Any, b: Any) -> bool:
        """No value is an instance of both, as their types or a required property's values show."""
        a, b = self._resolve(a), self._resolve(b)
        if not isinstance(a, dict) or not isinstance(b, dict):
            return False
        if not _types(a) & _types(b):
            return True
        if _has(a, _VALUES) and _has(b, _VALUES):
            return not any(value in _values(b) for value in _values(a))
        if _types(a) & _types(b) != {"object"}:
            return False
        required = set(a.get("required", ())) & set(b.get("required", ()))
        of_a, of_b = a.get("properties", {}), b.get("properties", {})
        return any(key in of_a and key in of_b and self._exclusive(of_a[key], of_b[key]) for key in required)

    def _resolve(self, schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            found = self._root
            for part in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
                found = found.get(part) if isinstance(found, dict) else None
            schema = found
        return schema

    # ---- type, values and the keywords of each type ------------------------------------------------------------------

    def _asserted(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        if _has(schema, _VALUES):
            return self._enumerated(schema, at)
        if "type" not in schema:  # then xgrammar ignores most keywords
            meant = [kind for kind, keywords in _FAMILIES.items() if _has(schema, keywords)]
            if meant:
                schema["type"] = meant[0] if len(meant) == 1 else meant
        kinds = _types(schema)
        if "multipleOf" in schema:
            self._check_multiple(schema, kinds, at)
        if "string" in kinds:
            self._write_string(schema, at)
        if "type" in schema and "array" in kinds and not _has(schema, ("items", "prefixItems")):
            schema["items"] = True  # without it some forms allow no item
        if "object" in kinds and _has(schema, _OBJECT):
            self._write_object(schema, at)
        return schema

    def _enumerated(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        """`enum` and `const`, beside which xgrammar ignores all else: only the values of the type."""
        beside = [key for key in _ASSERTIONS if key in schema and key not in ("type", "format", *_VALUES)]
        if beside:
            self._refuse(at, f"`{beside[0]}` beside `enum` or `const` cannot be enforced; drop the values it forbids")
        kinds = _types(schema)
        values = [value for value in _values(schema) if _type_of(value) & kinds]
        if not values:
            raise SchemaError(at, "no value of `enum` or `const` is of the type")
        return {key: value for key, value in schema.items() if key not in _ASSERTIONS} | {"enum": values}

    def _check_multiple(self, schema: dict[str, Any], kinds: set[str], at: str) -> None:
        of = schema["multipleOf"]
        if "number" in kinds or not isinstance(of, int) or not 0 < of <= MAX_MULTIPLE_OF:
            self._refuse(at, f"`multipleOf` can be enforced for integers and 1 to {MAX_MULTIPLE_OF} only")
        if _has(schema, _NUMBER[:4]):  # xgrammar takes both for some ranges, and drops `multipleOf` for others
            self._refuse(at, "`multipleOf` beside a bound cannot be enforced; use `enum`")

    def _write_string(self, schema: dict[str, Any], at: str) -> None:
        lengths = [key for key in ("minLength", "maxLength") if key in schema]
        if "pattern" in schema:
            if lengths:
                self._refuse(at, f"`{lengths[0]}` beside `pattern` cannot be enforced; write it into the pattern")
            schema["pattern"] = self._pattern(schema["pattern"], pointer(at, ("pattern",)))
        elif lengths:  # xgrammar's own bounded strings may hold bare control characters, which is no JSON
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            if type(least) is int and (most == "" or (type(most) is int and least <= most)):
                schema["pattern"] = f".{{{least},{most}}}"
                for key in lengths:
                    del schema[key]
        if lengths or "pattern" in schema:
            schema.pop("format", None)  # it would displace them, and says nothing about validity

    def _pattern(self, pattern: Any, at: str) -> Any:
        try:
            return anywhere(str(pattern))
        except PatternError as error:
            self._refuse(at, str(error))
            return pattern

    def _write_object(self, schema: dict[str, Any], at: str) -> None:
        properties, patterns = schema.get("properties") or {}, schema.get("patternProperties") or {}
        if not isinstance(properties, dict) or not isinstance(patterns, dict):
            return  # xgrammar refuses it
        others = schema.get("additionalProperties", True)
        required = schema.get("required")
        for name in required if isinstance(required, list) else ():
            if name not in properties:
                if others is False or patterns:
                    self._refuse(at, f"`required` names {name!r}, which is not among `properties`")
                properties = {**properties, name: others}
        if properties:
            schema["properties"] = properties
        for pattern in patterns:
            if any(_matches(pattern, name) for name in properties):
                self._refuse(at, f"`patternProperties` {pattern!r} matches one of `properties`: only one would hold")
        if len(patterns) > 1 and any(value != next(iter(patterns.values())) for value in patterns.values()):
            self._refuse(at, "`patternProperties` of several patterns cannot be enforced; a key might match two")
        if patterns:
            schema["patternProperties"] = {
                self._pattern(pattern, pointer(at, ("patternProperties", pattern))): part
                for pattern, part in patterns.items()
            }
        if "propertyNames" in schema and properties:
            self._refuse(at, "`propertyNames` beside `properties` cannot be enforced; leave it out")
        least = schema.get("minProperties")
        if isinstance(least, int) and least <= len(set(required or ())):
            del schema["minProperties"]
        elif least is not None and (patterns or schema.get("additionalProperties", not properties)):
            # a key may come twice
            self._refuse(at, "`minProperties` cannot be enforced where others than the listed properties may be")
        if "maxProperties" in schema and not properties and not patterns:
            schema.setdefault("additionalProperties", True)


def _has(schema: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    return any(key in schema for key in keys)


def _values(schema: Mapping[str, Any]) -> list[Any]:
    values = schema.get("enum", [schema.get("const")])
    return values if isinstance(values, list) else []


def _types(schema: Any) -> set[str]:
    """The types that instances may have, "integer" beside "number"; all where nothing says."""
    if isinstance(schema, dict) and "type" not in schema and _has(schema, _VALUES):
        return set[str]().union(*(_type_of(value) for value in _values(schema)))
    kinds = schema.get("type") if isinstance(schema, dict) else None
    if kinds is None:
        return {*_TYPES, "integer"}
    found = set(kinds) if isinstance(kinds, list) else {str(kinds)}
    return found | {"integer"} if "number" in found else found


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return {"integer", "number"}
    return {kind for kind, of in _TYPES.items() if isinstance(value, of)}


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:  # in other words than Python's: say it does
        return True
