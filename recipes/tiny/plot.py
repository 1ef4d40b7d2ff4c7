"""The curves of training logs, and needle accuracy over depth and length of evaluations, as PNG.

python -m recipes.tiny.plot recipes/tiny/log/*.jsonl recipes/tiny/log/eval_*.json --out recipes/tiny/log
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BY_LAYER = {
    "kl": "indexer KL", "recall": "attention mass inside the indexer's top-k",
    "oracle": "attention mass inside the best top-k", "spread": "-log mass inside the wanted set",
}  # fmt: skip


def curves(log: Path, out: Path) -> None:
    """One panel a quantity of a training log."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line]
    panels: list[tuple[str, list[dict[str, Any]]]] = [
        ("loss", [{**line.get("by_task", {}), "MTP": line["mtp_loss"]} for line in lines if "mtp_loss" in line]),
        ("MTP hit", [{"hit": line["mtp_hit"]} for line in lines if "mtp_hit" in line]),
        *((title, [dict(enumerate(line[key])) for line in lines if any(line.get(key, []))])
          for key, title in BY_LAYER.items()),
    ]  # fmt: skip
    panels = [(title, rows) for title, rows in panels if rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels):
        for name in rows[-1]:
            points = [row.get(name) for row in rows]
            axis.plot(range(len(points)), points, label=str(name), linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("log lines")
        axis.set_yscale("log" if title in ("loss", "indexer KL", BY_LAYER["spread"]) else "linear")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / f"{log.stem}.png", dpi=90)


def depths(reports: list[dict[str, Any]], out: Path) -> None:
    """Needle accuracy over depth and length, a panel each way of selecting."""
    grids = [(mode, r, r["depth"][mode]) for r in reports for mode in ("sparse", "layout", "random")
             if mode in r.get("depth", {})]  # fmt: skip
    if not grids:
        return
    figure, axes = plt.subplots(1, len(grids), figsize=(5.5 * len(grids), 3.6), squeeze=False)
    titles = {
        "sparse": "the indexer's top-k",
        "layout": "indexer with the main attention's rope layout",
        "random": "random top-k",
    }
    for axis, (mode, report, grid) in zip(axes[0], grids):
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
        axis.set_xticks(
            range(len(report["depth"]["depths"])), [f"{d:.0%}" for d in report["depth"]["depths"]], fontsize=7
        )
        axis.set_yticks(range(len(report["depth"]["lengths"])), report["depth"]["lengths"])
        axis.set_xlabel("depth of the needle")
        axis.set_ylabel("tokens")
        axis.set_title(titles[mode])
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(out / "needle_depth.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="training logs (.jsonl), evaluations (.json)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for file in args.files:
        if file.suffix == ".jsonl":
            curves(file, args.out)
    depths(
        [json.loads(file.read_bytes()) for file in sorted(args.files, reverse=True) if file.suffix == ".json"], args.out
    )


if __name__ == "__main__":
    main()
