"""The curves of a training log as PNG.

python -m recipes.tiny.plot recipes/tiny/log/*.jsonl --out recipes/tiny/log
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for log in args.logs:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line]
        panels: list[tuple[str, list[dict[str, Any]]]] = [
            ("loss", [{**line.get("by_task", {}), "MTP": line["mtp_loss"]} for line in lines if "mtp_loss" in line]),
            ("MTP hit", [{"hit": line["mtp_hit"]} for line in lines if "mtp_hit" in line]),
            ("indexer KL", [dict(enumerate(line["kl"])) for line in lines if "kl" in line]),
            ("attention mass inside top-k", [dict(enumerate(line["recall"])) for line in lines if "recall" in line]),
        ]
        panels = [(title, rows) for title, rows in panels if rows]
        figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
        for axis, (title, rows) in zip(axes[0], panels):
            for name in rows[-1]:
                points = [row.get(name) for row in rows]
                axis.plot(range(len(points)), points, label=str(name), linewidth=1)
            axis.set_title(title)
            axis.set_xlabel("log lines")
            axis.set_yscale("log" if title in ("loss", "indexer KL") else "linear")
            axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(args.out / f"{log.stem}.png", dpi=110)


if __name__ == "__main__":
    main()
