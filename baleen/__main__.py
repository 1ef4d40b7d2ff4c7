"""`baleen serve | chat | eval | bench | doctor | route`. What a user can fix is one line on stderr and exit code 2."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from baleen import __version__, flags
from baleen.config import SECTIONS, ConfigError

USAGE = """usage: baleen COMMAND [--help]

  serve    serve a checkpoint over HTTP (OpenAI API); --dry-run shows what would run and why
  chat     talk to a running server in the terminal
  eval     measure the answers of a running server
  bench    measure speed: batch, one static batch without a server (of a running server: not built yet)
  doctor   what this machine has, which kernels run on it; --tune measures the FP8 products anew
  route    send requests to prefill and decode servers (not built yet)
"""


def main(*prefix: str) -> int:
    """Run this process's command line, with `prefix` before it."""
    argv, environ = flags.process_arguments()
    return command([*prefix, *argv], environ)


def command(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run one command; returns the exit code."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": lambda rest: serve(rest, environ),
        "chat": chat,
        "eval": evaluate,
        "bench": lambda rest: bench(rest, environ),
        "doctor": doctor,
        "route": route,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"baleen {__version__}")
        return 0
    try:
        if argv[0] not in commands:
            raise ConfigError(argv[0], "unknown command", f"use one of {', '.join(commands)}")
        return commands[argv[0]](argv[1:])
    except ConfigError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def _complain(line: str) -> None:
    print("baleen: error:", " ".join(line.split()), file=sys.stderr)


def serve(argv: list[str], environ: Mapping[str, str]) -> int:
    """Resolve, explain, serve. 2 if anything that was asked for cannot be done."""
    resolution = flags.resolve(argv, environ)
    if resolution.dry_run:
        print(describe(resolution))
        return 2 if resolution.refusals else 0
    level = resolution.config.server.log_level
    for line in resolution.warnings if level != "error" else ():
        print(f"baleen: warning: {line}", file=sys.stderr)
    for line in resolution.refusals:
        _complain(line)
    if resolution.refusals:
        return 2
    if level in ("debug", "info"):
        print("baleen: what was left open became (every setting: --dry-run):", file=sys.stderr)
        for key, reason in resolution.reasons.items():
            print(f"  {_flag(key) + ' ' + _setting(resolution, key):<38}  {reason}", file=sys.stderr)
    from baleen import launch

    return launch.serve(resolution.config)


def describe(resolution: flags.Resolution) -> str:
    """The dry run: every setting with the reason of each automatic choice, the memory plan, warnings, refusals."""
    config = resolution.config
    lines = [f"checkpoint: {config.model_path or config.load.model_path + ' (not on this machine)'}"]
    for name, section in SECTIONS.items():
        lines += ["", f"{name}: {section.__doc__}"]
        for field in dataclasses.fields(section):
            key = f"{name}.{field.name}"
            reason = f"  # {resolution.reasons[key]}" if key in resolution.reasons else ""
            lines.append(f"  {_flag(key):<40}{_setting(resolution, key):<18}{reason}".rstrip())
    lines += ["", "memory plan:", resolution.plan.table()]
    for title, items in (("warnings", resolution.warnings), ("refused", resolution.refusals)):
        if items:
            lines += ["", f"{title}:", *(f"  {item}" for item in items)]
    return "\n".join(lines)


def _flag(key: str) -> str:
    """What a user writes to set "section.field"."""
    section, name = key.split(".")
    declared = {field.name: field for field in dataclasses.fields(SECTIONS[section])}[name]
    variables = [variable for variable, target in flags.ENVIRONMENT.items() if target == key]
    return str((*declared.metadata["flags"], *variables)[0])


def _setting(resolution: flags.Resolution, key: str) -> str:
    section, name = key.split(".")
    value = getattr(getattr(resolution.config, section), name)
    declared = {field.name: field for field in dataclasses.fields(SECTIONS[section])}[name]
    return "(given)" if value is not None and declared.metadata["secret"] else str(value)


def chat(argv: list[str]) -> int:
    parser = flags.Parser(prog="baleen chat", description="Talk to a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server")
    parser.add_argument("--model", help="model name; default: the one served")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--thinking", action="store_true", help="let the model reason before it answers")
    parser.add_argument("--max-tokens", type=int, help="longest reply")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    given = parser.parse(argv)
    if given.max_tokens is not None and given.max_tokens < 1:
        raise ConfigError("--max-tokens", f"{given.max_tokens} is too small", "write at least 1")
    if given.temperature is not None and not given.temperature >= 0:
        raise ConfigError("--temperature", f"{given.temperature} is negative", "write at least 0")
    from baleen import chat_client

    return chat_client.main(**vars(given))


def evaluate(argv: list[str]) -> int:
    parser = flags.Parser(prog="baleen eval", description="Measure the answers of a running server.")
    parser.add_argument("task", choices=("gsm8k", "arithmetic", "needle", "tools", "json", "copy", "gpqa", "aime25"))
    parser.add_argument("--url", "--base-url", default="http://127.0.0.1:30000", help="the server")
    parser.add_argument("--model", help="model name; default: the first one served")
    parser.add_argument("--api-key", help="bearer token")
    parser.add_argument("--data-path", type=Path, help="gsm8k: GSM8K's JSON lines instead of the bundled problems")
    parser.add_argument("--num-shots", type=int, default=0, help="gsm8k: so many answered questions come first")
    parser.add_argument("--num-questions", "--num-examples", type=int, help="how many are asked, all kinds together")
    parser.add_argument("--parallel", type=int, default=16, help="questions asked at once")
    parser.add_argument("--repeat", type=int, default=1, help="ask every question so many times")
    parser.add_argument("--max-tokens", type=int, help="longest answer; default: what fits")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--thinking", action="store_const", const=True, help="always; default: as each problem says")
    parser.add_argument("--no-thinking", action="store_const", const=False, dest="thinking", help="never")
    parser.add_argument("--thinking-mode", choices=("deepseek-v3",), help="SGLang's spelling of --thinking")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write settings, figures and answers as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needle: accuracy by depth and length as PNG")
    given = parser.parse(argv)
    if given.task in ("gpqa", "aime25"):
        fix = "point an evaluation client of the OpenAI API at the server (lm-eval, sglang.test.run_eval)"
        raise ConfigError(f"baleen eval {given.task}", "its questions do not come with baleen", fix)
    for name in ("num_questions", "parallel", "repeat", "max_tokens"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ConfigError(_option(name), f"{getattr(given, name)} is too small", "write at least 1")
    if given.num_shots < 0:
        raise ConfigError("--num-shots", f"{given.num_shots} is negative", "write at least 0")
    for name, task in (("data_path", "gsm8k"), ("num_shots", "gsm8k"), ("plot", "needle")):
        if getattr(given, name) and given.task != task:
            raise ConfigError(_option(name), f"is for {task}", "leave it out")
    from baleen.evals import run

    fields = ("model", "max_tokens", "temperature", "top_p")
    return run.main(
        given.task,
        url=given.url,
        api_key=given.api_key,
        data_path=given.data_path,
        num_shots=given.num_shots,
        num_questions=given.num_questions,
        parallel=given.parallel,
        repeat=given.repeat,
        thinking=True if given.thinking_mode else given.thinking,
        options={name: getattr(given, name) for name in fields if getattr(given, name) is not None},
        out=given.out,
        plot=given.plot,
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def bench(argv: list[str], environ: Mapping[str, str]) -> int:
    if argv[:1] == ["batch"]:
        from baleen.bench import batch

        return batch.main(argv[1:], environ)
    parser = flags.Parser(prog="baleen bench", description="Measure speed: of one batch, or of a running server.")
    parser.add_argument("what", choices=("serve", "batch", "speculative"))
    given = parser.parse(argv)
    fix = "any load generator for the OpenAI API can be pointed at the server"
    raise ConfigError(f"baleen bench {given.what}", "needs the benchmark clients, not built yet", fix)


def doctor(argv: list[str]) -> int:
    from baleen import doctor as command_module

    return command_module.main(argv)


def route(argv: list[str]) -> int:
    parser = flags.Parser(prog="baleen route", description="Send requests to prefill and decode servers.")
    parser.add_argument("--pd-disaggregation", action="store_true", help="two kinds of servers")
    parser.add_argument("--prefill", nargs="+", action="append", metavar="URL [PORT]", help="server and bootstrap port")
    parser.add_argument("--decode", action="append", metavar="URL", help="server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=30000, help="port to listen on")
    parser.parse(argv)
    raise ConfigError("baleen route", "needs prefill/decode disaggregation, not built yet", "use baleen serve")


if __name__ == "__main__":
    sys.exit(main())
