"""Draw what ``run.py --json`` has written: ``python benchmarks/plot.py RESULTS.json FOLDER`` makes one picture for each question."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from paired import spread

_OURS, _OTHERS = "tab:blue", "lightgray"


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Draw each comparison into a PNG of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    foot = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    for name, found in results["benchmarks"].items():
        for result in found:
            if "runs" in result:
                slug = re.sub(r"[^a-z0-9]+", "-", result["title"].lower()).strip("-")[:80]
                _bars(result, foot, folder / f"{name}-{slug}.png")


def _bars(result: Mapping[str, Any], foot: str, path: Path) -> None:
    names = list(result["runs"])
    ours = {t["way"] for t in result["targets"]} or {names[0]}
    walls = [result["runs"][n]["wall"] for n in names]
    middles = [median(w) for w in walls]
    errors = [
        [m - spread(w)[0] for m, w in zip(middles, walls, strict=True)],
        [spread(w)[1] - m for m, w in zip(middles, walls, strict=True)],
    ]
    goals = [t for t in result["targets"] if t["clock"] == "wall"]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.45 * len(names) + 0.22 * len(goals)), layout="constrained")
    axes.barh(names, middles, xerr=errors, color=[_OURS if n in ours else _OTHERS for n in names], capsize=3)
    for place, middle in enumerate(middles):
        rate = f", {result['bytes'] / 1e9 / middle:.2f} GB/s" if result["bytes"] else ""
        axes.text(0.01 * max(middles), place, f"{middle:.3g} s{rate}", va="center", fontsize=8)
    for number, goal in enumerate(goals):
        limit = goal["at_most"] * median(result["runs"][goal["beside"]]["wall"])
        met = "met" if goal["ratio"] <= goal["at_most"] else "missed"
        label = f"at most {goal['at_most']:g} × {goal['beside']} ({met}: {goal['way']} takes {goal['ratio']:.2f} ×)"
        axes.axvline(limit, color=f"C{1 + number}", linestyle="--", linewidth=1.2, label=label)
    axes.invert_yaxis()
    axes.set_xlabel("seconds: median, and the spread between runs; less is better")
    axes.set_title(result["title"], fontsize=10)
    if goals:
        figure.legend(loc="outside lower left", fontsize=7)
    figure.text(0.995, 0.002, foot, ha="right", va="bottom", fontsize=4.5, color="gray")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
