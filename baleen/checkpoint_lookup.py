"""Where a checkpoint lies: a local folder, or a hub name in the local Hugging Face cache. Never the network.

The cache has a folder `models--ORG--NAME` for each; its `refs/REVISION` holds a commit, `snapshots/COMMIT` the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baleen.config import ConfigError

BUNDLED = Path(__file__).parent / "tiny"  # the trained model that comes with the package
BUNDLED_NAME = "baleen-tiny"


class NotInCache(ConfigError):
    """A well-formed hub name that this machine does not have."""


def find(name: str, revision: str, environ: Mapping[str, str], flag: str = "--model") -> Path:
    """The folder of `name`. Raises NotInCache for a hub name that is not there, ConfigError for a path that is not."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ConfigError(flag, f"{name!r} is not a folder", "give a checkpoint folder, or a hub name like ORG/NAME")
    cache = _hub_cache(environ)
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise NotInCache(
            flag,
            f"{name} ({revision}) is neither a folder nor in {cache}",
            f"run `hf download {name}`, or give a folder",
        )
    return snapshot


def _hub_cache(environ: Mapping[str, str]) -> Path:
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser() / "huggingface" / "hub"


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder."""
    if not (folder / "config.json").exists():
        raise ConfigError("--model", f"{folder} has no config.json", "give a checkpoint folder in Hugging Face format")
    raw = _read_object(folder / "config.json")
    # ModelOpt writes its quantisation beside config.json.
    beside = folder / "hf_quant_config.json"
    if beside.is_file() and "quantization_config" not in raw:
        raw["quantization_config"] = _read_object(beside).get("quantization", {})
    return raw


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("--model", f"cannot read {path}: {error}", "download the checkpoint again") from None
    if not isinstance(raw, dict):
        raise ConfigError("--model", f"{path} is not a JSON object", "download the checkpoint again")
    return raw
