"""Draws plots as SVG for the offline page: latency against steps, stages, roofline, training, quality against time."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.reporting.rows import Row

STAGES = ("decode file", "pre-process", "image encoder", "10 steps", "decoder and head", "write files")
TRAINING = ("engine: data", "engine: encode", "engine: forward", "engine: backward", "engine: step")


INK = "#123456"  # stands for the page's own colour of text while matplotlib draws
FAINT, STRONG = "#8b8b8b", "#3b82c4"  # both can be seen on white and on black


def figure(draw: Callable[[Any], None], height: float = 3.8) -> str:
    """Returns one pair of axes, drawn on by `draw`, as an SVG element of 8.2 x `height` inches.

    It has no background; text and frame have the page's colour.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", **ink}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        made = Figure(figsize=(8.2, height), layout="tight")
        axes = FigureCanvasSVG(made).figure.subplots()
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")


def latency_against_steps(rows: Sequence[Row]) -> str | None:
    """Draws a line per variant at batch 1, for the size that was measured first."""
    rows = [row for row in rows if row["name"] == "whole image" and row["case"]["batch"] == 1]
    if not rows:
        return None
    size = rows[0]["case"]["size"]
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["case"]["size"] == size:
            lines[row["variant"]].append((row["case"]["steps"], row["p50"]))

    def draw(axes: Any) -> None:
        for variant, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", markersize=4, linewidth=1.4, label=variant)
        axes.set(xlabel="denoising steps", ylabel=f"ms an image of {size}", xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)

    return figure(draw)


def bars(groups: dict[str, dict[str, float]], order: Sequence[str]) -> str:
    """Draws a stacked horizontal bar per group, milliseconds."""

    def draw(axes: Any) -> None:
        left = dict.fromkeys(groups, 0.0)
        for part in order:
            widths = [values.get(part, 0.0) for values in groups.values()]
            axes.barh(list(groups), widths, left=list(left.values()), label=part)
            left = {name: left[name] + width for name, width in zip(groups, widths)}
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return figure(draw, 1.6 + 0.4 * len(groups))


def stage_waterfall(rows: Sequence[Row]) -> str | None:
    """Draws where a picture's time goes, a bar per variant, for the size that was measured first."""
    rows = [row for row in rows if row["name"] in STAGES]
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["case"]["size"] == rows[0]["case"]["size"]:
            groups[row["variant"]][row["name"]] = row["p50"]
    return bars(groups, STAGES) if groups else None


def training_breakdown(rows: Sequence[Row]) -> str | None:
    """Draws where a training step's time goes."""
    groups = {"engine": {row["name"]: row["value"] for row in rows if row["name"] in TRAINING}}
    return bars(groups, TRAINING) if groups["engine"] else None


def roofline(rows: Sequence[Row]) -> str:
    """Draws kernels under the data sheet's roof: measured ones as dots, all others where the floor would be, hollow."""
    from ldmseg_fast.kernels.case import all_cases
    from ldmseg_fast.kernels.roofline import GPUS, find_gpu, floor_us

    name = next((row["environment"]["gpu"]["name"] for row in rows), None)
    gpu = find_gpu(name) or next(gpu for gpu in GPUS if gpu.name == "H200")
    floors = [
        (c.operations / c.bytes_moved, c.operations / floor_us(c, gpu) / 1e6)
        for c in all_cases()
        if c.operations and floor_us(c, gpu) < float("inf")  # a GPU without fp8 never gets there
    ]
    measured = [
        (row["flops"] / row["bytes"], row["flops"] / row["p50"] / 1e9)
        for row in rows
        if row.get("flops") and row.get("bytes") and row["variant"] == "triton"
    ]

    def draw(axes: Any) -> None:
        x = [2.0**power for power in range(0, 14)]
        axes.plot(x, [min(gpu.half_operations, v * gpu.bandwidth) / 1e12 for v in x], color=FAINT, linewidth=1.2)
        axes.scatter(*zip(*floors), facecolors="none", edgecolors=FAINT, label="the kernel's floor")
        if measured:
            axes.scatter(*zip(*measured), color=STRONG, label=f"measured on {name}")
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel=f"TFLOP/s, {gpu.name}")
        axes.legend(frameon=False, fontsize=8)

    return figure(draw)


def quality_against_time(rows: Sequence[Row]) -> str | None:
    """Draws PQ on held-out images against milliseconds an image, one dot per number of steps."""
    lines: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for row in rows:
        if "ms_per_image" in row and "steps" in row["case"] and not row["case"]["split"].startswith("train"):
            label = f"{row['variant']}, {row['case']['data']} {row['case']['split']}"
            lines[label].append((row["ms_per_image"], row["value"], row["case"]["steps"]))
    if not lines:
        return None

    def draw(axes: Any) -> None:
        for label, points in lines.items():
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", linewidth=1.2, label=label)
            for milliseconds, pq, steps in points:
                axes.annotate(str(steps), (milliseconds, pq), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="ms an image (numbers: steps)", ylabel="PQ, %", xscale="log", ylim=(0, 100))
        axes.legend(frameon=False, fontsize=8)

    return figure(draw)


PLOTS: tuple[tuple[str, str, Callable[[Sequence[Row]], str | None]], ...] = (
    ("Latency against steps", "latency", latency_against_steps),
    ("Where a picture's time goes", "latency", stage_waterfall),
    ("Where a training step's time goes", "training", training_breakdown),
    ("Quality against time", "quality", quality_against_time),
    ("Kernels under the roof", "kernels", roofline),
)
