"""The shape of the package: who may import whom, who may touch the outside, how long a file or function may be, and
the tree in the docs.
"""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

REPO = pathlib.Path(__file__).parent.parent
ROOT = REPO / "baleen"
MAY_IMPORT = {  # part -> parts it may import; a part may always import itself
    "model_config": "",
    "config": "model_config",
    "messages": "",
    "kernels": "",
    "memory_plan": "config",
    "checkpoint_lookup": "config",
    "checkpoint_variant": "config",
    "hardware": "",
    "resolver": "config hardware",
    "device_choices": "config resolver",
    "flags": "config memory_plan checkpoint_lookup checkpoint_variant hardware resolver device_choices",
    "chat": "config messages checkpoint_variant",
    "scheduler": "config messages",
    "server": "config messages chat",
    "attention": "config messages kernels",
    "sampling": "config messages kernels",
    "model": "config attention kernels",
    "runner": "config messages memory_plan model attention sampling kernels",
    "engine": "config messages chat scheduler runner sampling",
    "llm": "config flags messages chat engine",
    "launch": "config messages chat engine server",
    "chat_client": "",
    "evals": "config",
    "bench": "config flags messages runner",
    "doctor": "config flags hardware kernels",
    "__main__": "bench doctor evals config flags launch chat_client",
    "launch_server": "__main__",
    "launch_router": "__main__",
    "__init__": "messages llm",
}
OUTSIDE = {  # outside module -> parts that may import it
    "torch": "kernels attention sampling model runner engine",
    "torch.distributed": "",
    "triton": "kernels",
    "transformers": "",
    "xgrammar": "sampling",
    "fastapi": "server",
    "pydantic": "server",
    "uvicorn": "launch",
    "prometheus_client": "server",
    "safetensors": "model",
    "zmq": "engine server",
    "argparse": "flags",
    "sys.argv": "flags",
    "os.environ": "flags",
    "os.getenv": "flags",
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
FORBIDDEN_NAMES = {"utils", "util", "common", "impl", "manager", "helpers", "misc"}


def package_files() -> list[pathlib.Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if not p.name.startswith(("test_", "bench_", "conftest"))]


def imports() -> Iterator[tuple[pathlib.Path, str, str]]:
    """(file, importing part, dotted name); imports inside functions and under TYPE_CHECKING count too."""
    for path in package_files():
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: use absolute imports"
                for alias in node.names:
                    yield path, part, f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield path, part, alias.name
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in OUTSIDE:
                yield path, part, ast.unparse(node)


def test_every_part_has_a_rule() -> None:
    parts = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in package_files()}
    assert parts == set(MAY_IMPORT), "a part without a rule, or a rule without a part"


def test_parts_import_only_downwards() -> None:
    seen = 0
    for path, part, name in imports():
        if name.startswith("baleen.") and name != "baleen.__version__":
            seen += 1
            target = name.split(".")[1]
            assert target == part or target in MAY_IMPORT[part].split(), f"{path}: {part} may not import {target}"
    assert seen > 50, "the walk found no imports: the test itself is broken"


@pytest.mark.parametrize("module", OUTSIDE)
def test_outside_imports(module: str) -> None:
    for path, part, name in imports():
        if name == module or name.startswith(module + "."):
            assert part in OUTSIDE[module].split(), f"{path}: {part} may not import {module}"


def test_rules_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, targets in MAY_IMPORT.items() if part not in done and set(targets.split()) <= done}
        assert ready, f"cycle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize(
    "modules",
    [
        "baleen",
        "baleen.__main__, baleen.flags, baleen.memory_plan, baleen.launch, baleen.server.app",
        "baleen.scheduler.scheduler, baleen.chat.encoding, baleen.chat.tokenizer, baleen.chat.detokenizer",
    ],
)
def test_starts_without_torch(modules: str) -> None:
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_file_size() -> None:
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path


def test_function_size() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_names_say_what_is_inside() -> None:
    for path in ROOT.rglob("*"):
        assert path.stem not in FORBIDDEN_NAMES, path


def test_every_module_opens_with_a_docstring() -> None:
    for path in package_files():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_tree_in_the_docs_is_the_tree_on_disk() -> None:
    """docs/architecture.md draws every file of the package but tests, and nothing else."""
    text = (REPO / "docs" / "architecture.md").read_text()
    tree = text.split("<!-- tree -->")[1]
    drawn: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        match = re.match(r"^( *)([\w.]+/?)(?:\s{2,}.*)?$", line)
        if not match or line.startswith("```"):
            continue
        depth, name = len(match[1]) // 2, match[2]
        folders = [*folders[:depth], name.rstrip("/")]
        if name.endswith(".py"):
            drawn.add("/".join(folders))
    kernels = ROOT / "kernels"
    on_disk = {
        str(p.relative_to(REPO))
        for p in package_files()
        if not (p.is_relative_to(kernels) and p.parent != kernels)  # one folder an op, all alike: listed by name
    }
    assert drawn == on_disk
    ops = {p.name for p in kernels.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    listed = re.search(r"^ *<op>/ +(.*)$", tree, re.MULTILINE)
    assert listed
    assert set(listed[1].split()) == ops
