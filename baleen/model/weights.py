"""Loads a checkpoint folder into a model's parameters.

The model says what it takes (`checkpoint_tensors`), each tensor with the place it goes to; this module matches that
against the shards' headers, refuses by name whatever does not fit, and only then reads, row block by row block, shard
after shard in file order.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Protocol

import torch
from tqdm import tqdm

from baleen.model.quant import BLOCK, SCALE_SUFFIX, dequantize_rows, find_scale, read_scale
from baleen.model.shards import ShardReader, StoredTensor, WeightError, open_checkpoint

__all__ = ["CheckpointModel", "LoadReport", "Target", "WeightError", "fill_randomly", "load_weights"]

FP8_STD = 32.0  # of random FP8 values


@dataclass(eq=False, slots=True)
class Target:
    """One tensor the model takes from the checkpoint.

    name      as in the checkpoint
    shape     as in the checkpoint
    dest      allocated, of exactly `shape` (a view into a larger parameter will do), float32, bfloat16 or float8_e4m3fn
    kind      "linear": the checkpoint may store it as block FP8, which is dequantised into `dest` (float);
              "plain": stored F32 or BF16 for a float `dest`, F8_E4M3 for an FP8 one (its scales are another target)
    optional  the optional targets (the MTP layer) are all in the checkpoint or none is
    """

    name: str
    shape: tuple[int, ...]
    dest: torch.Tensor
    kind: Literal["plain", "linear"] = "plain"
    optional: bool = False


class CheckpointModel(Protocol):
    """What `load_weights` asks of a model. `ignored` are glob patterns of names that it leaves out on purpose."""

    @property
    def ignored(self) -> Sequence[str]: ...

    def checkpoint_tensors(self) -> Iterable[Target]: ...


@dataclass(frozen=True)
class LoadReport:
    seconds: float
    bytes_read: int
    num_tensors: int  # of the model; the scales of FP8 weights are not counted
    optional_loaded: bool  # False: the checkpoint has none of the optional tensors; their destinations were not written


@dataclass(frozen=True, eq=False)
class _Load:
    target: Target
    stored: StoredTensor
    scale: StoredTensor | None

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes + (self.scale.num_bytes if self.scale else 0)


def load_weights(model: CheckpointModel, folder: Path, *, progress: bool = True) -> LoadReport:
    """Fill every destination the model names from the safetensors checkpoint in `folder`.

    Raises: WeightError, before any payload is read, for a missing, unknown, wrongly shaped, wrongly typed or truncated
    tensor and for shards that disagree with their index; while reading, for scales that are NaN, infinite or negative.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(folder)
    loads, optional_loaded = _match(list(model.checkpoint_tensors()), model.ignored, checkpoint, folder)
    num_bytes = sum(load.num_bytes for load in loads)
    bar = tqdm(
        total=num_bytes,
        desc="loading weights",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
    )
    with torch.no_grad(), ShardReader() as reader, bar:
        for load in sorted(loads, key=lambda load: (load.stored.path, load.stored.offset)):
            _load(load, reader, bar)
    num_tensors = sum(not load.stored.name.endswith(SCALE_SUFFIX) for load in loads)
    return LoadReport(time.monotonic() - started, num_bytes, num_tensors, optional_loaded)


def fill_randomly(model: CheckpointModel, seed: int) -> LoadReport:
    """Random weights in place of a checkpoint (`--load-format dummy`): products keep the size of their input."""
    started = time.monotonic()
    targets = list(model.checkpoint_tensors())
    devices = {target.dest.device for target in targets}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    with torch.no_grad():
        for target in targets:
            _fill(target, generators)
    return LoadReport(time.monotonic() - started, 0, len(targets), True)


def _fill(target: Target, generators: Mapping[torch.device, torch.Generator]) -> None:
    dest = target.dest
    generator = generators[dest.device]
    if len(target.shape) == 1:
        dest.fill_(0.0 if target.name.endswith("bias") else 1.0)
    elif target.name.endswith(SCALE_SUFFIX):
        # one power of two for the whole weight, as wide as `shape[-1]` blocks
        dest.fill_(2.0 ** round(math.log2((target.shape[-1] * BLOCK) ** -0.5 / FP8_STD)))
    elif dest.dtype == torch.float8_e4m3fn:
        values = torch.empty(dest.shape, dtype=torch.bfloat16, device=dest.device)
        dest.copy_(values.normal_(std=FP8_STD, generator=generator).clamp_(-448, 448))
    else:
        dest.normal_(std=target.shape[-1] ** -0.5, generator=generator)


def _match(
    targets: Sequence[Target], ignored: Sequence[str], checkpoint: dict[str, StoredTensor], folder: Path
) -> tuple[list[_Load], bool]:
    """Pair each target with its stored tensor and scales. Raises WeightError for whatever does not pair."""
    optional_loaded = any(target.optional and target.name in checkpoint for target in targets)
    wanted = [target for target in targets if optional_loaded or not target.optional]
    missing = [target.name for target in wanted if target.name not in checkpoint]
    if missing:
        raise WeightError(
            f"{folder} lacks {_listed(missing)}: a shard was left out, or config.json is of a different model"
        )
    loads = []
    for target in wanted:
        stored = checkpoint[target.name]
        _check(target, stored)
        loads.append(_Load(target, stored, find_scale(stored, checkpoint) if target.kind == "linear" else None))
    taken = {load.stored.name for load in loads} | {load.scale.name for load in loads if load.scale}
    extra = [
        stored
        for name, stored in checkpoint.items()
        if name not in taken and not any(fnmatchcase(name, pattern) for pattern in ignored)
    ]
    if extra:
        raise WeightError(
            f"{_listed(list(map(str, extra)))}: not taken by the model that config.json describes; check there "
            "num_hidden_layers, num_nextn_predict_layers, n_routed_experts, quantization_config, or remove the tensor"
        )
    return loads, optional_loaded


def _check(target: Target, stored: StoredTensor) -> None:
    fp8_dest = target.dest.dtype == torch.float8_e4m3fn
    if tuple(target.dest.shape) != target.shape or target.dest.is_meta or (fp8_dest and target.kind == "linear"):
        raise ValueError(
            f"{target.name} is a {target.kind} target of {list(target.shape)}, which cannot go to "
            f"{target.dest.dtype} {list(target.dest.shape)} on {target.dest.device}"
        )
    if stored.shape != target.shape:
        raise WeightError(
            f"{stored} must have shape {list(target.shape)} by config.json: the shards are of a different model"
        )
    allowed = ["F8_E4M3"] if fp8_dest else ["F32", "BF16"]
    if target.kind == "linear":
        allowed.append("F8_E4M3")
    if stored.dtype not in allowed:
        raise WeightError(
            f"{stored} must be {' or '.join(allowed)}: check quantization_config in config.json, or convert it"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _load(load: _Load, reader: ShardReader, bar: tqdm) -> None:
    stored, dest = load.stored, load.target.dest
    if stored.name.endswith(SCALE_SUFFIX):
        dest.copy_(read_scale(reader, stored))
        bar.update(stored.num_bytes)
        return
    scale = None
    if load.scale is not None:
        scale = read_scale(reader, load.scale).to(dest.device)
        bar.update(load.scale.num_bytes)
    # Whole scale blocks: the rows of one multiplier are not split.
    for first, last in stored.row_blocks(BLOCK if scale is not None else 1):
        rows = reader.rows(stored, first, last)
        bar.update(rows.nbytes)
        if scale is not None:
            rows = dequantize_rows(rows.to(dest.device), scale, first)
        dest[first:last].copy_(rows)
