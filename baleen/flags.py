"""Command line, environment, config.json and the machine -> one resolved, frozen `Config`.

The only reader of argv and of the environment. Every flag that is given is used, or warned about, or refused: never
ignored. What cannot be (an unknown flag, a bad value, a broken config.json) raises `ConfigError`; what could be but is
not built yet, or does not fit on this machine, is a line of `Resolution.refusals`: a dry run still shows the rest.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baleen import device_choices, memory_plan
from baleen.checkpoint_lookup import BUNDLED, BUNDLED_NAME, NotInCache, find, read_config
from baleen.checkpoint_variant import choose_chat
from baleen.config import AUTO, PAGE_SIZE, PUBLISHED, SECTIONS, Config, ConfigError, ModelConfig
from baleen.device_choices import round_up
from baleen.hardware import Hardware
from baleen.resolver import Given, Resolver, kind_of, settings

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


def resolve(argv: list[str], environ: Mapping[str, str], hardware: Hardware | None = None) -> Resolution:
    """Resolve a launch line. Raises ConfigError; `--help` prints and raises SystemExit."""
    given, dry_run = _parse(argv)
    return _resolve(given, environ, hardware or Hardware.detect(), dry_run=dry_run)


def default_config(model_path: str | Path, **overrides: Any) -> Config:
    """The config of `--model model_path`, with settings by field name (`kv_cache_dtype="fp8_e4m3"`). Refusals raise."""
    by_name = {key.split(".")[1]: key for key in settings()}
    given = {"load.model_path": Given("model_path", str(model_path))}
    for name, value in overrides.items():
        if name not in by_name:
            raise ConfigError(name, "unknown setting", _suggestion(name, by_name))
        given[by_name[name]] = Given(name, os.fspath(value) if isinstance(value, os.PathLike) else value)
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
        setattr(namespace, self.dest, Given(option_string or "", True if self.nargs == 0 else values))


def _parse(argv: list[str]) -> tuple[dict[str, Given], bool]:
    parser = Parser(
        prog="baleen serve",
        usage="baleen serve --model CHECKPOINT [flags]",
        description="Serve a DeepSeek-V3.2 checkpoint.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and why, then exit")
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(f"{name}: {(section.__doc__ or '').rstrip('.')}")
        for key, setting in settings().items():
            if not key.startswith(f"{name}.") or not setting.metadata["flags"]:
                continue
            nargs = 0 if kind_of(key) is bool else None
            metavar = {int: "N", float: "X", str: "NAME" if setting.metadata["choices"] else "TEXT"}.get(kind_of(key))
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


# ---- from settings to a config ---------------------------------------------------------------------------------------


def _resolve(given: dict[str, Given], environ: Mapping[str, str], hardware: Hardware, *, dry_run: bool) -> Resolution:
    given, unread = _with_environment(given, environ)
    r = Resolver(given, hardware)
    r.warnings += unread
    _notes(r)
    _refuse_unbuilt(r)
    folder, model = _find_model(r, environ, dry_run)
    _load(r, model)
    _api_key(r)
    _chat(r, folder)
    device_choices.cache(r, model)
    device_choices.attention(r, model)
    device_choices.sizes(r)
    device_choices.graphs(r, model)
    available = hardware.gpu_bytes if device_choices.on_gpu(r) and hardware.gpu_bytes else hardware.memory_bytes
    config, plan = _fit(r, folder, model, available)
    return Resolution(
        config=config, plan=plan, reasons=r.reasons, warnings=r.warnings, refusals=r.refusals, dry_run=dry_run
    )


def _with_environment(given: dict[str, Given], environ: Mapping[str, str]) -> tuple[dict[str, Given], list[str]]:
    """Add what variables set and flags do not. Also returns warnings about the variables that set nothing."""
    given, warnings = dict(given), []
    for variable, key in ENVIRONMENT.items():
        if variable in environ and key in given:
            warnings.append(f"{variable}: no effect, {given[key].spelling} sets the same")
        elif variable in environ:
            given[key] = Given(variable, environ[variable])
    others = sorted(name for name in environ if name.startswith("SGLANG_") and name not in ENVIRONMENT)
    if others:
        warnings.append(f"{', '.join(others)}: no effect, baleen does not read such variables")
    return given, warnings


def _notes(r: Resolver) -> None:
    """Old spellings, and flags that change nothing."""
    for key, item in r.given.items():
        meta = settings()[key].metadata
        if item.spelling in meta["old"]:
            r.warnings.append(f"{item.spelling}: old spelling of {meta['flags'][0]}")
        if meta["no_effect"]:
            r.warnings.append(f"{item.spelling}: no effect, {meta['no_effect']}")
        if meta["note"]:
            r.reasons[key] = meta["note"]


def _refuse_unbuilt(r: Resolver) -> None:
    """One line for each thing that is missing, naming every flag that asks for it."""
    asked: dict[str, list[str]] = {}
    for key, item in r.given.items():
        setting = settings()[key]
        meta, value = setting.metadata, r[key]
        if not meta["needs"] or value == meta["default"] or value in meta["built"]:
            continue
        shown = item.spelling if meta["secret"] or value is True else f"{item.spelling} {item.value}"
        asked.setdefault(meta["needs"], []).append(shown)
    r.refusals += [f"{', '.join(shown)}: needs {what}, not built yet" for what, shown in asked.items()]


def _find_model(r: Resolver, environ: Mapping[str, str], dry_run: bool) -> tuple[str, ModelConfig]:
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


def _load(r: Resolver, model: ModelConfig) -> None:
    device_choices.device(r)
    r.choose("load.load_format", "safetensors", "the checkpoint's files")
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


def _api_key(r: Resolver) -> None:
    """An empty one is most often a variable that is not set, and what no header can carry would lock everybody out."""
    key = r["server.api_key"]
    if key is not None and not (key.isascii() and key.isprintable() and key == "".join(key.split()) != ""):
        raise r.error("server.api_key", "is empty or has other than printable ASCII characters", "write e.g. sk-abc123")


def _chat(r: Resolver, folder: str) -> None:
    names = (r["load.model_path"], r["server.served_model_name"])
    template, parser = r["server.chat_template"], r["server.tool_call_parser"]
    choices, refusals = choose_chat(template, parser, folder, r["load.tokenizer_path"], names)
    for choice in choices:
        r.choose(*choice)
    r.refusals += refusals


def _fit(r: Resolver, folder: str, model: ModelConfig, available: int) -> tuple[Config, memory_plan.MemoryPlan]:
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
        # on a CPU more memory than this only waits for a cache that old
        full = running if device_choices.on_gpu(r) else min(running, 8)
        wanted = full * round_up(context)
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
