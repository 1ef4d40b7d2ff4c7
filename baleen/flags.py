"""Command line, environment, config.json and the machine -> one resolved, frozen `Config`.

The only reader of argv and of the environment. Every flag that is given is used, or warned about, or refused: never
ignored. What cannot be (an unknown flag, a bad value, a broken config.json) raises `ConfigError`; what could be but is
not built yet, or does not fit on this machine, is a line of `Resolution.refusals`: a dry run still shows the rest.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from baleen import memory_plan
from baleen.checkpoint_lookup import BUNDLED, BUNDLED_NAME, NotInCache, find, read_config
from baleen.checkpoint_variant import choose_chat
from baleen.config import AUTO, PAGE_SIZE, PUBLISHED, SECTIONS, Config, ConfigError, ModelConfig
from baleen.hardware import Hardware

__all__ = ["Hardware", "Parser", "Resolution", "default_config", "process_arguments", "resolve"]

# SGLang's environment variables that mean something here -> the setting.
ENVIRONMENT = {
    "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "attention.dense_prefill_threshold",
    "SGLANG_NSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "attention.dense_prefill_threshold",
    "SGLANG_PP_LAYER_PARTITION": "parallel.pp_layer_partition",
    "SGLANG_REQ_WAITING_TIMEOUT": "scheduler.request_waiting_timeout",
    "SGLANG_REQ_RUNNING_TIMEOUT": "scheduler.request_running_timeout",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A config with nothing left open, and how it came to be.

    reasons    "section.field" -> why, for each value that was not given
    warnings   what was given and has no effect, or another effect than elsewhere
    refusals   what was asked for and cannot be done; the config must not be run unless this is empty
    """

    config: Config
    plan: memory_plan.MemoryPlan
    reasons: dict[str, str]
    warnings: list[str]
    refusals: list[str]
    dry_run: bool


@dataclass(frozen=True, slots=True)
class _Given:
    """One setting as the user wrote it."""

    spelling: str
    value: Any


def resolve(argv: list[str], environ: Mapping[str, str], hardware: Hardware | None = None) -> Resolution:
    """Resolve a launch line. Raises ConfigError; `--help` prints and raises SystemExit."""
    given, dry_run = _parse(argv)
    return _resolve(given, environ, hardware or Hardware.detect(), dry_run=dry_run)


def default_config(model_path: str | Path, **overrides: Any) -> Config:
    """The config of `--model model_path`, with settings by field name (`kv_cache_dtype="fp8_e4m3"`). Refusals raise."""
    by_name = {key.split(".")[1]: key for key in _settings()}
    given = {"load.model_path": _Given("model_path", str(model_path))}
    for name, value in overrides.items():
        if name not in by_name:
            raise ConfigError(name, "unknown setting", _suggestion(name, by_name))
        given[by_name[name]] = _Given(name, os.fspath(value) if isinstance(value, os.PathLike) else value)
    resolution = _resolve(given, os.environ, Hardware.detect(), dry_run=False)
    if resolution.refusals:
        raise ConfigError("settings", "; ".join(resolution.refusals), "leave these out")
    return resolution.config


def process_arguments() -> tuple[list[str], Mapping[str, str]]:
    """This process's own command line and environment, for the entry points."""
    return sys.argv[1:], os.environ


# ---- the command line ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors and name the nearest known flag."""

    def error(self, message: str) -> typing.NoReturn:
        match = re.match(r"argument (\S+): (.*)", message)
        if match and match[2].startswith("ignored explicit argument"):
            raise ConfigError(match[1].split("/")[0], "takes no value", "give the flag alone")
        if match:
            raise ConfigError(match[1].split("/")[0], match[2], f"see {self.prog} --help")
        raise ConfigError("command line", message, f"see {self.prog} --help")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            word = next((text for text in unknown if text.startswith("-")), unknown[0]).split("=")[0]
            if not word.startswith("-"):
                raise ConfigError(
                    repr(word), "unexpected argument", "flags start with --, and a value follows its flag"
                )
            raise ConfigError(word, "unknown flag", _suggestion(word, self._option_string_actions))
        return namespace


class _Record(argparse.Action):
    """Keeps the spelling with the text; the last of several wins, as everywhere."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, _Given(option_string or "", True if self.nargs == 0 else values))


def _parse(argv: list[str]) -> tuple[dict[str, _Given], bool]:
    parser = Parser(
        prog="baleen serve",
        usage="baleen serve --model CHECKPOINT [flags]",
        description="Serve a DeepSeek-V3.2 checkpoint.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and why, then exit")
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(f"{name}: {(section.__doc__ or '').rstrip('.')}")
        for key, setting in _settings().items():
            if not key.startswith(f"{name}.") or not setting.metadata["flags"]:
                continue
            nargs = 0 if _kind(key) is bool else None
            metavar = {int: "N", float: "X", str: "NAME" if setting.metadata["choices"] else "TEXT"}.get(_kind(key))
            choices = f" [{', '.join(setting.metadata['choices'])}]" if setting.metadata["choices"] else ""
            works = [value for value in setting.metadata["built"] if value != AUTO]
            built = f" (built: {', '.join(works)})" if works else " (not built yet)"
            text = setting.metadata["help"] + choices + (built if setting.metadata["needs"] else "")
            text = text.replace("%", "%%")
            group.add_argument(
                *setting.metadata["flags"], dest=key, action=_Record, nargs=nargs, metavar=metavar, help=text
            )
            if setting.metadata["old"]:
                group.add_argument(
                    *setting.metadata["old"], dest=key, action=_Record, nargs=nargs, help=argparse.SUPPRESS
                )
    given = vars(parser.parse(argv))
    dry_run = given.pop("dry_run", False)
    return given, dry_run


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else "see --help"


@functools.cache
def _settings() -> dict[str, Field[Any]]:
    """ "section.field" -> its declaration."""
    return {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}


@functools.cache
def _kind(key: str) -> type:
    """bool, int, float or str; `int | None` counts as int."""
    name, field_name = key.split(".")
    hint = typing.get_type_hints(SECTIONS[name])[field_name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] if typing.get_args(hint) else [hint]
    return kinds[0]


def _value(key: str, setting: Field[Any], given: _Given) -> Any:
    """Text or object as the setting's type, within its choices and bounds."""
    meta, kind, value = setting.metadata, _kind(key), given.value
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


# ---- from settings to a config ---------------------------------------------------------------------------------------


class _Resolver:
    """The values by "section.field", and what is said about them on the way."""

    def __init__(self, given: dict[str, _Given], hardware: Hardware) -> None:
        settings = _settings()
        self.given = given
        self.hardware = hardware
        self.values = {key: setting.metadata["default"] for key, setting in settings.items()}
        self.values |= {key: _value(key, settings[key], item) for key, item in given.items()}
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
        spelling = self.given[key].spelling if key in self.given else _settings()[key].metadata["flags"][0]
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


def _resolve(given: dict[str, _Given], environ: Mapping[str, str], hardware: Hardware, *, dry_run: bool) -> Resolution:
    given, unread = _with_environment(given, environ)
    r = _Resolver(given, hardware)
    r.warnings += unread
    _notes(r)
    _refuse_unbuilt(r)
    folder, model = _find_model(r, environ, dry_run)
    _load(r, model)
    _api_key(r)
    _chat(r, folder)
    _attention(r, model)
    _sizes(r)
    _cache(r, model)
    config, plan = _fit(r, folder, model, hardware.memory_bytes)
    return Resolution(
        config=config, plan=plan, reasons=r.reasons, warnings=r.warnings, refusals=r.refusals, dry_run=dry_run
    )


def _with_environment(given: dict[str, _Given], environ: Mapping[str, str]) -> tuple[dict[str, _Given], list[str]]:
    """Add what variables set and flags do not. Also returns warnings about the variables that set nothing."""
    given, warnings = dict(given), []
    for variable, key in ENVIRONMENT.items():
        if variable in environ and key in given:
            warnings.append(f"{variable}: no effect, {given[key].spelling} sets the same")
        elif variable in environ:
            given[key] = _Given(variable, environ[variable])
    others = sorted(name for name in environ if name.startswith("SGLANG_") and name not in ENVIRONMENT)
    if others:
        warnings.append(f"{', '.join(others)}: no effect, baleen does not read such variables")
    return given, warnings


def _notes(r: _Resolver) -> None:
    """Old spellings, and flags that change nothing."""
    for key, item in r.given.items():
        meta = _settings()[key].metadata
        if item.spelling in meta["old"]:
            r.warnings.append(f"{item.spelling}: old spelling of {meta['flags'][0]}")
        if meta["no_effect"]:
            r.warnings.append(f"{item.spelling}: no effect, {meta['no_effect']}")
        if meta["note"]:
            r.reasons[key] = meta["note"]


def _refuse_unbuilt(r: _Resolver) -> None:
    """One line for each thing that is missing, naming every flag that asks for it."""
    asked: dict[str, list[str]] = {}
    for key, item in r.given.items():
        setting = _settings()[key]
        meta, value = setting.metadata, r[key]
        if not meta["needs"] or value == meta["default"] or value in meta["built"]:
            continue
        shown = item.spelling if meta["secret"] or value is True else f"{item.spelling} {item.value}"
        asked.setdefault(meta["needs"], []).append(shown)
    r.refusals += [f"{', '.join(shown)}: needs {what}, not built yet" for what, shown in asked.items()]


def _find_model(r: _Resolver, environ: Mapping[str, str], dry_run: bool) -> tuple[str, ModelConfig]:
    """The checkpoint's folder and its config.json with the overrides; the published numbers if it is not here."""
    if "load.model_path" not in r.given:
        r.choose("load.model_path", str(BUNDLED), "no --model: the small trained model that comes with baleen")
        r.choose("server.served_model_name", BUNDLED_NAME, "the bundled model")
    name = r["load.model_path"]
    try:
        spelling = r.given["load.model_path"].spelling if "load.model_path" in r.given else "--model"
        path = find(name, r["load.revision"], environ, spelling)
        folder, raw = str(path), read_config(path)
    except NotInCache as error:
        if name not in PUBLISHED:
            raise
        folder, raw = "", PUBLISHED[name]
        r.reasons["load.model_path"] = "not on this machine: planned with the published numbers"
        if not dry_run:
            r.refusals.append(str(error))
    try:
        overrides = json.loads(r["load.json_model_override_args"])
    except ValueError as error:
        raise r.error(
            "load.json_model_override_args", f"not JSON: {error}", """write e.g. '{"index_topk": 64}'"""
        ) from None
    if not isinstance(overrides, dict):
        raise r.error("load.json_model_override_args", "not a JSON object", """write e.g. '{"index_topk": 64}'""")
    if r.is_auto("load.tokenizer_path"):
        r.choose("load.tokenizer_path", folder or name, "the checkpoint's")
    else:
        r.values["load.tokenizer_path"] = str(find(r["load.tokenizer_path"], "main", environ, "--tokenizer-path"))
    r.choose("server.served_model_name", name, "as given to --model")
    model = ModelConfig.from_json({**raw, **overrides})
    r.refusals += [f"config.json {line}" for line in model.unsupported]
    return folder, model


def _load(r: _Resolver, model: ModelConfig) -> None:
    if r.hardware.device == "cpu":
        r.choose("load.device", "cpu", "no GPU found")
    r.choose("load.device", "cpu", "a GPU is present, but execution on it is not built yet")
    r.choose("load.load_format", "safetensors", "the checkpoint's files")
    r.choose("load.dtype", "float32", "a CPU emulates bfloat16, 3 to 5 times slower")
    own = "fp8" if model.quantization else "none"
    if not r.is_auto("load.quantization") and r["load.quantization"] != own:
        asked = r.given["load.quantization"]
        if not model.unsupported:
            r.refusals.append(f"{asked.spelling} {asked.value}: needs a checkpoint quantised so; this one's is {own}")
        else:
            r.refusals.append(f"{asked.spelling} {asked.value}: needs its weight format and kernels, not built yet")
    r.choose("load.quantization", own, "as config.json says")
    r.choose("load.context_length", model.max_position_embeddings, "max_position_embeddings of the model")
    if r["load.context_length"] > model.max_position_embeddings:
        most = model.max_position_embeddings
        raise r.error(
            "load.context_length", f"{r['load.context_length']} is above the model's {most}", f"at most {most}"
        )
    seed = int.from_bytes(os.urandom(4), "little") >> 1
    r.choose("load.random_seed", seed, "drawn at start; give it to repeat a run")


def _api_key(r: _Resolver) -> None:
    """An empty one is most often a variable that is not set, and what no header can carry would lock everybody out."""
    key = r["server.api_key"]
    if key is not None and not (key.isascii() and key.isprintable() and key == "".join(key.split()) != ""):
        raise r.error("server.api_key", "is empty or has other than printable ASCII characters", "write e.g. sk-abc123")


def _chat(r: _Resolver, folder: str) -> None:
    names = (r["load.model_path"], r["server.served_model_name"])
    template, parser = r["server.chat_template"], r["server.tool_call_parser"]
    choices, refusals = choose_chat(template, parser, folder, r["load.tokenizer_path"], names)
    for choice in choices:
        r.choose(*choice)
    r.refusals += refusals


def _attention(r: _Resolver, model: ModelConfig) -> None:
    r.choose("attention.attention_backend", "dsa", "the model has an indexer (index_topk)")
    for key in ("prefill_backend", "decode_backend", "topk_backend", "moe_runner_backend", "kernels"):
        r.choose(f"attention.{key}", "reference", "plain torch, the one for a CPU")
    crossover = 4 * model.index_topk
    r.choose(
        "attention.dense_prefill_threshold", crossover, "4 index_topk: masked multi-head prefill is faster up to here"
    )


def _round_up(value: int) -> int:
    return -(-value // PAGE_SIZE) * PAGE_SIZE


def _sizes(r: _Resolver) -> None:
    """Requests and tokens of one step, and which requests."""
    if r["scheduler.schedule_policy"] == "priority":
        r.values["scheduler.enable_priority_scheduling"] = True
    low_first = "scheduler.schedule_low_priority_values_first"
    if r[low_first] and not r["scheduler.enable_priority_scheduling"]:
        r.refusals.append(f"{r.given[low_first].spelling}: priorities are off; add --enable-priority-scheduling")
    chunk_key, running_key = "scheduler.chunked_prefill_size", "scheduler.max_running_requests"
    chunk = r[chunk_key]
    if chunk == -1:
        r.values[chunk_key] = chunk = _round_up(r["load.context_length"] + PAGE_SIZE)
        r.reasons[chunk_key] = "-1: a whole prompt of the longest context fits in one step"
    if chunk != AUTO and (chunk <= 0 or chunk % PAGE_SIZE):
        raise r.error(
            chunk_key, f"{chunk} is not a positive multiple of {PAGE_SIZE}", "write e.g. 512, or -1 for whole prompts"
        )
    most = 64 if chunk == AUTO else min(64, chunk // 2)
    r.choose(running_key, most, "64 on a CPU, and at most half of --chunked-prefill-size")
    running = r[running_key]
    r.choose(
        chunk_key, max(512, _round_up(running + PAGE_SIZE)), "512 on a CPU, and room beside a token of each request"
    )
    if r[chunk_key] <= running:
        problem = f"{r[chunk_key]} leaves no token for a prompt beside {running} running requests"
        raise r.error(chunk_key, problem, f"write at least {_round_up(running + 1)}, or lower --max-running-requests")


def _cache(r: _Resolver, model: ModelConfig) -> None:
    """Layout of the KV cache."""
    if r["cache.page_size"] != PAGE_SIZE:
        r.warnings.append(
            f"{r.given['cache.page_size'].spelling} {r['cache.page_size']}: the index layout has pages of 64; using 64"
        )
        r.values["cache.page_size"] = PAGE_SIZE
    r.choose("cache.kv_cache_dtype", "float32", "exact, and what a CPU computes in")
    if model.quantization is None:
        r.choose("cache.index_cache_dtype", "float32", "the checkpoint is not quantised: the selection is exact")
    r.choose("cache.index_cache_dtype", "fp8_e4m3", "the checkpoint is FP8: selects as the released model does")
    if r["cache.kv_cache_dtype"] == "fp8_e4m3" and model.kv_lora_rank % 128:
        problem = f"fp8_e4m3 scales blocks of 128, and this model's kv_lora_rank is {model.kv_lora_rank}"
        raise r.error("cache.kv_cache_dtype", problem, "choose float32 or bfloat16")
    if r["cache.index_cache_dtype"] == "fp8_e4m3" and model.index_head_dim > 128:
        problem = (
            f"fp8_e4m3 has one scale for up to 128 values, and this model's index_head_dim is {model.index_head_dim}"
        )
        raise r.error("cache.index_cache_dtype", problem, "choose float32")
    r.choose("cache.mem_fraction_static", 0.5, "on a CPU, half of the available memory; the rest is the system's")


def _fit(r: _Resolver, folder: str, model: ModelConfig, available: int) -> tuple[Config, memory_plan.MemoryPlan]:
    """Size the KV pool to what the budget leaves beside weights and buffers; refused if that is nothing."""
    key = "cache.max_total_tokens"
    asked = PAGE_SIZE if r.is_auto(key) else r[key] // PAGE_SIZE * PAGE_SIZE
    if not r.is_auto(key) and asked != r[key]:
        r.warnings.append(f"{r.given[key].spelling} {r[key]}: rounded down to whole pages, {asked}")
    running, context = r["scheduler.max_running_requests"], r["load.context_length"]
    config = r.config(folder, model, {key: asked})
    plan = memory_plan.plan(config, available)
    if plan.total > plan.budget:
        r.refusals.append(
            f"--mem-fraction-static {r['cache.mem_fraction_static']}: needs {_gib(plan.total)} for weights, buffers and"
            f" {asked} cached tokens, and allows {_gib(plan.budget)} of the {_gib(available)} available; raise it,"
            f" lower --max-total-tokens or --context-length, or use a larger machine"
        )
    elif r.is_auto(key):
        fits = asked + (plan.budget - plan.total) // plan.token // PAGE_SIZE * PAGE_SIZE
        full = min(running, 8)  # on a CPU more memory than this only waits for a cache that old
        wanted = full * _round_up(context)
        reason = f"{full} requests of {context} tokens" if fits >= wanted else "what the memory budget leaves"
        r.choose(key, min(fits, wanted), reason)
        asked = min(fits, wanted)
    r.choose(key, asked, "one page: nothing fits")
    if asked < context and plan.total <= plan.budget:
        r.warnings.append(f"--max-total-tokens {asked}: no request can be longer, though --context-length is {context}")
    config = r.config(folder, model, {key: asked})
    return config, memory_plan.plan(config, available)


def _gib(size: int) -> str:
    return f"{size / memory_plan.GIB:,.1f} GiB" if size >= memory_plan.GIB else f"{size / 2**20:.0f} MiB"
