"""The settings as they were given and as they become: what `flags` and `device_choices` work on."""

from __future__ import annotations

import functools
import re
import types
import typing
from dataclasses import Field, dataclass, fields
from typing import Any

from baleen.config import AUTO, SECTIONS, Config, ConfigError, ModelConfig
from baleen.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as the user wrote it."""

    spelling: str
    value: Any


@functools.cache
def settings() -> dict[str, Field[Any]]:
    """ "section.field" -> its declaration."""
    return {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}


@functools.cache
def kind_of(key: str) -> type:
    """bool, int, float or str; `int | None` counts as int."""
    name, field_name = key.split(".")
    hint = typing.get_type_hints(SECTIONS[name])[field_name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] if typing.get_args(hint) else [hint]
    return kinds[0]


def _value(key: str, setting: Field[Any], given: Given) -> Any:
    """Text or object as the setting's type, within its choices and bounds."""
    meta, kind, value = setting.metadata, kind_of(key), given.value
    if value in (AUTO, None) and value == meta["default"]:
        return value
    try:
        if isinstance(value, str):
            value = _whole(value) if kind is int else kind(value)
        elif kind is float and type(value) is int:
            value = float(value)
    except ValueError:
        value = None
    if type(value) is not kind:
        what = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[kind]
        raise ConfigError(given.spelling, f"{given.value!r} is not {what}", f"write {what}")
    value = meta["synonyms"].get(value, value)
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(given.spelling, f"{value!r} is not a choice", f"choose from {', '.join(meta['choices'])}")
    if meta["least"] is not None and not value >= meta["least"]:
        raise ConfigError(given.spelling, f"{value} is too small", f"write at least {meta['least']}")
    if meta["most"] is not None and not value <= meta["most"]:
        raise ConfigError(given.spelling, f"{value} is too large", f"write at most {meta['most']}")
    return value


def _whole(text: str) -> int:
    """An int; "128k" is 128,000 and "128K" 131,072, as in SGLang and vLLM."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG])", text.strip())
    if match is None:
        return int(text)
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
    number = float(match[1]) * scale
    if number != int(number):
        raise ValueError(text)
    return int(number)


class Resolver:
    """The values by "section.field", and what is said about them on the way."""

    def __init__(self, given: dict[str, Given], hardware: Hardware) -> None:
        declared = settings()
        self.given = given
        self.hardware = hardware
        self.values = {key: setting.metadata["default"] for key, setting in declared.items()}
        self.values |= {key: _value(key, declared[key], item) for key, item in given.items()}
        self.reasons: dict[str, str] = {}
        self.warnings: list[str] = []
        self.refusals: list[str] = []

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def is_auto(self, key: str) -> bool:
        return bool(self.values[key] == AUTO)

    def choose(self, key: str, value: Any, reason: str) -> None:
        """Settle an open setting; one that was given stays."""
        if self.is_auto(key):
            self.values[key] = value
            self.reasons[key] = reason

    def error(self, key: str, problem: str, fix: str) -> ConfigError:
        spelling = self.given[key].spelling if key in self.given else settings()[key].metadata["flags"][0]
        return ConfigError(spelling, problem, fix)

    def config(self, model_path: str, model: ModelConfig, last: dict[str, Any]) -> Config:
        """The config of the values, with those of `last` in place."""
        values = self.values | last
        open_keys = [key for key, value in values.items() if value == AUTO]
        assert not open_keys, f"nobody decides {open_keys}"
        sections = {
            name: section(**{f.name: values[f"{name}.{f.name}"] for f in fields(section)})
            for name, section in SECTIONS.items()
        }
        return Config(model_path=model_path, model=model, **sections)
