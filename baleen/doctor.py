"""`baleen doctor`: what this machine has, which implementation of each operation runs on it; `--tune` measures anew."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from baleen import flags
from baleen.config import ConfigError
from baleen.hardware import Hardware


def main(argv: list[str]) -> int:
    """Print the report, or write the table of FP8 products. 2 if it cannot be measured here."""
    parser = flags.Parser(prog="baleen doctor", description="What this machine has and what runs on it.")
    parser.add_argument(
        "--tune",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="measure which implementation is fastest for each shape of FP8 product, about two minutes on a GPU, and "
        "write the table to FILE; without FILE in place of the one that comes with the package",
    )
    given = parser.parse(argv)
    hardware = Hardware.detect()
    if given.tune is None:
        print("\n".join(report(hardware)))
        return 0
    if hardware.device != "cuda" or hardware.is_amd:
        raise ConfigError("--tune", "no NVIDIA GPU found", "run it on the machine that serves")
    from baleen.kernels.fp8_gemm import tune, tuned

    path = tuned.CHECKED_IN if given.tune == Path() else given.tune
    tune.tune(out_path=path, report=_print_fastest)
    print(f"written to {path}")
    return 0


def report(hardware: Hardware) -> list[str]:
    """The machine, then a line for each operation: what would run, and what else could."""
    gib = 1 << 30
    lines = [
        f"device      {hardware.device}" + (f", {hardware.gpu_bytes / gib:.0f} GiB" if hardware.gpu_bytes else ""),
        f"host        {hardware.num_cpus} CPUs, {hardware.memory_bytes / gib:.1f} GiB available",
    ]
    if hardware.device == "cuda":
        lines.append(f"capability  {hardware.capability / 10}")
        lines.append(f"libraries   {', '.join(sorted(hardware.libraries)) or 'none'}")
    lines += ["", "operation       runs, then what else loads"]
    import baleen.kernels
    from baleen.kernels.dispatch import available

    for module in pkgutil.iter_modules(baleen.kernels.__path__):
        if module.ispkg:
            names = available(import_module(f"baleen.kernels.{module.name}").IMPLEMENTATIONS)
            # a CPU runs the references, whatever loads
            lines.append(f"{module.name:<16}{', '.join(names) if hardware.device == 'cuda' else 'reference'}")
    return lines


def _print_fastest(num_tokens: int, num_rows: int, num_cols: int, results: list[Any]) -> None:
    timed = [(result.ms, result.choice.use) for result in results if result.ms is not None]
    fastest = "{1}, {0:.4f} ms".format(*min(timed)) if timed else "nothing runs"
    print(f"{num_tokens} x {num_rows} x {num_cols}: {fastest}", flush=True)
