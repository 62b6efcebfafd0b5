"""Draws quality against time, of the rows of `bench_quality.py`, as one picture.

python -m benchmarks.reporting.quality_curve FILE DATA SPLIT IMAGES

draws the current rows on one data set, from the root of the checkout. The picture in `results/` is that of
`benchmarks/results/quality-curve.png scenes20k val2017 500`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.result_file import BenchmarkError
from benchmarks.reporting.rows import load_rows
from ldmseg_fast.distributed.ending import run_command

Row = dict[str, Any]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points (ms, PQ) that no other beats in both, by rising time."""
    front: list[tuple[float, float]] = []
    for ms, pq in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or pq > front[-1][1]:
            front.append((ms, pq))
    return front


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows of trained models by name and, where it is not DDIM, solver; by rising steps."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "steps" in row["case"] and "arm" not in row["case"]:
            solver = row["case"].get("solver", "ddim")
            label = row["variant"] + ("" if solver == "ddim" else f", {solver}")
            found.setdefault(label, []).append(row)
    return {label: sorted(group, key=lambda row: row["case"]["steps"]) for label, group in found.items()}


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Draws one line per model and solver, with its steps as labels and the deviation over seeds as bars.

    Behind them stand the Pareto front and a level for each baseline.

    Raises:
        BenchmarkError: no row is one of a model that samples.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = curves(rows)
    if not groups:
        raise BenchmarkError(f"{path}: nothing to draw, no row of a model that samples; give NAME=MODEL_DIR")
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    front = pareto_front([(row["ms_per_image"], row["value"]) for group in groups.values() for row in group])
    axes.step(*zip(*front), where="post", color="0.85", linewidth=6, zorder=0, label="Pareto front")
    for label, group in groups.items():
        times, values = [row["ms_per_image"] for row in group], [row["value"] for row in group]
        errors = [row.get("deviation", 0.0) for row in group]
        axes.errorbar(times, values, errors, marker="o", markersize=4, capsize=3, linewidth=1.2, label=label)
        for row, ms, value in zip(group, times, values):
            axes.annotate(str(row["case"]["steps"]), (ms, value), (3, 4), textcoords="offset points", fontsize=7)
    levels = {row["variant"]: row["value"] for row in rows if "steps" not in row["case"]}
    for name, value in levels.items():
        axes.axhline(value, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(name, (1.0, value), (-3, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=7, color="0.4")  # fmt: skip
    case = next(iter(groups.values()))[0]["case"]
    axes.set_xscale("log")
    axes.set_xlabel("ms per image (numbers: denoising steps)")
    axes.set_ylabel(f"PQ, class-agnostic, %, on {case['data']} {case['split']}, {case['images']} maps")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 4 or not argv[3].isdigit():
        print(f"usage: {(__doc__ or '').splitlines()[2]}", file=sys.stderr)
        return 2
    file, data, split, images = argv
    wanted = {"data": data, "split": split, "images": int(images), "mode": "class-agnostic"}
    draw_curve([row for row in load_rows("quality") if wanted.items() <= row["case"].items()], Path(file))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
