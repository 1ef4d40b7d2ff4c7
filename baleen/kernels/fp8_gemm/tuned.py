"""FP8 linear layers by whichever implementation was measured to be the fastest for a shape and a number of rows.

`tuned_h200.json` holds what was measured on one H200, `tune.py` measures; shapes that are not in the table go by a rule
that held for those that are. On a GPU older than Hopper the reference runs.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baleen.kernels.dispatch import available
from baleen.kernels.fp8_gemm import IMPLEMENTATIONS, reference
from baleen.kernels.fp8_quant import Quantized

CHECKED_IN = Path(__file__).with_name("tuned_h200.json")
FEW_TOKENS = 64  # up to here reading the weight takes longest
_WHOLE = 16  # numbers of tokens that are a multiple of it can be another implementation's


class Choice(NamedTuple):
    """An implementation's name, and the fields of triton_kernel.Config where it is that one's."""

    use: str
    config: tuple[int, ...] | None = None


Table = Mapping[tuple[int, int], Mapping[int, Choice]]  # (N, K) -> M -> choice, which holds up to that M
Run = Callable[[Quantized, Tensor, Tensor, torch.dtype], Tensor]

_runs: dict[tuple[int, int, int, bool, int], Run] = {}
_table: Table | None = None


def fp8_gemm(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    num_tokens, device = x.values.shape[0], x.values.get_device()
    num_rows, num_cols = weight.shape
    # Powers of two, as those that were measured are: between two of them all choices are the same.
    key = (num_rows, num_cols, (num_tokens - 1).bit_length(), num_tokens % _WHOLE == 0, device)
    run = _runs.get(key)
    if run is None:
        run = _runs[key] = _choose(num_tokens, num_rows, num_cols, device)
    return run(x, weight, weight_scale_inv, dtype)


def use_table(path: Path) -> None:
    """Takes the choices of a file that `tune` wrote, from the next call on."""
    global _table
    _table = read_table(path)
    _runs.clear()


def read_table(path: Path) -> Table:
    """Raises:  ValueError if the file is no such table."""
    try:
        shapes = json.loads(path.read_text())["shapes"]
        return {
            (int(shape.split("x")[0]), int(shape.split("x")[1])): {
                int(tokens): Choice(entry["use"], tuple(entry["config"]) if "config" in entry else None)
                for tokens, entry in entries.items()
            }
            for shape, entries in shapes.items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is no table of FP8 products: {error!r}") from error


def choices(num_tokens: int, num_rows: int, num_cols: int) -> list[Choice]:
    """What is to run such a product, in order of preference; not all of it can."""
    global _table
    if _table is None:
        _table = read_table(CHECKED_IN)
    measured = _table.get((num_rows, num_cols), {})
    tokens = sorted(measured)
    first = [measured[tokens[min(bisect_left(tokens, num_tokens), len(tokens) - 1)]]] if tokens else []
    rule = ("triton", "deep_gemm", "scaled_mm") if num_tokens <= FEW_TOKENS else ("deep_gemm", "scaled_mm", "triton")
    return first + [Choice(name) for name in rule]


def _choose(num_tokens: int, num_rows: int, num_cols: int, device: int) -> Run:
    for name, config in choices(num_tokens, num_rows, num_cols) if _is_hopper(device) else ():
        module = modules().get(name)
        if module is not None and module.takes(num_tokens, num_rows, num_cols):
            return bind(Choice(name, config))
    return reference.fp8_gemm


def bind(choice: Choice) -> Run:
    """The function that runs it."""
    module = modules()[choice.use]
    if choice.config is None:
        run: Run = module.fp8_gemm
        return run
    options = module.Config(*choice.config)

    def configured(x: Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
        result: Tensor = module.fp8_gemm(x, weight, weight_scale_inv, dtype, options)
        return result

    return configured


@cache
def modules() -> dict[str, Any]:
    """The implementations that can be loaded here, but this one and the reference."""
    others = {name: target for name, target in IMPLEMENTATIONS.items() if name not in ("tuned", "reference")}
    return {name: import_module(others[name].split(":")[0]) for name in available(others)}


def _is_hopper(device: int) -> bool:
    return device >= 0 and torch.cuda.get_device_capability(device)[0] >= 9
