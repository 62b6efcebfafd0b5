"""Makes one offline HTML page of a run: panoptic quality, curves, pictures, timings. The file embeds everything."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.run_records import LOG, read_log
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.reports.page import Page


def require_matplotlib() -> None:
    """Raises ArgumentError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ArgumentError("the curves of a run need matplotlib: pip install 'ldmseg_fast[train]'") from None


def curves(run: Path) -> bytes:
    """Draws the loss (log axis) and the validation PQ of a run against the step, as a PNG.

    Raises:
        ArgumentError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(run)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    quality = [(row["step"], row["val/pq"]) for row in rows if "val/pq" in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), dpi=110)
    for axis, points, label, marker in ((axes[0], losses, "loss", ""), (axes[1], quality, "validation PQ, %", "o")):
        if points:
            steps, values = zip(*points)
            axis.plot(steps, values, marker=marker, linewidth=1.4, color="#2b6cb0")
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if losses and min(value for _, value in losses) > 0:
        axes[0].set_yscale("log")
    if quality:
        axes[1].set_ylim(0, max(100.0 if max(v for _, v in quality) > 60 else 1.15 * max(v for _, v in quality), 1.0))
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def last_picture(run: Path) -> bytes | None:
    """Reads the newest picture grid of a run's validation, a PNG; None where there is none."""
    pictures = sorted((run / "pictures").glob("step-*.png"))
    return pictures[-1].read_bytes() if pictures else None


def write_run_report(run: Path, path: Path) -> Path:
    """Writes curves, newest pictures and settings of one training run as one HTML page, and returns `path`.

    Raises:
        FileNotFoundError: `run` holds no log.
        ArgumentError: matplotlib is not installed.
    """
    if not read_log(run):
        raise FileNotFoundError(f"{run}: no {LOG} in it, so it is no training run (or has not logged yet)")
    page = Page(f"Training run {run.name}")
    page.picture(curves(run), "loss and panoptic quality against the step")
    picture = last_picture(run)
    if picture:
        page.picture(picture, "image, truth, prediction on the validation split")
    settings = run / "settings.txt"
    if settings.is_file():
        page.details("settings", settings.read_text(encoding="utf-8", errors="replace"))
    page.write(path)
    return path


def quality_rows(report: dict[str, Any]) -> list[list[str]]:
    """Returns rows of name, PQ, SQ, RQ for the model and the baselines of an evaluation report."""
    named = {"model": report["class_agnostic"]} | report["baselines"]
    return [[name, *(f"{row[key]:.1f}" for key in ("pq", "sq", "rq"))] for name, row in named.items()]
