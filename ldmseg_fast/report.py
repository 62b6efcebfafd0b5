"""One offline HTML page of a run: panoptic quality, curves, pictures, timings. Everything is embedded in the file."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import replacing

LOG = Path("logs") / "log.jsonl"  # of a run's folder
STYLE = """
:root { color-scheme: light dark; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --dim: #9a9a9a; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #8884; } th:first-child, td:first-child
{ text-align: left; } tr.strong td { font-weight: 650; }
img { max-width: 100%; height: auto; border-radius: 4px; } figure { margin: 1rem 0; }
h1, h3, td:first-child { overflow-wrap: anywhere; }
figcaption, .note { color: var(--dim); font-size: .9rem; } pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 46rem) { body { margin: 1rem auto; } h1 { font-size: 1.35rem; } th, td { padding: .3rem .4rem; } }
"""


@dataclass
class Page:
    """Collects the parts of the page, in order."""

    title: str
    parts: list[str] = field(default_factory=list)
    style: str = ""  # CSS after the common one

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        self.parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def table(self, header: list[str], rows: list[list[str]], strong: int | None = None) -> None:
        """`strong`: the row that is set in bold."""
        lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
        for number, row in enumerate(rows):
            lines.append(f'<tr class="{"strong" if number == strong else ""}">')
            lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
        self.parts.append("".join(lines) + "</table>")

    def picture(self, png: bytes, caption: str) -> None:
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def markup(self, text: str) -> None:
        """HTML as it is."""
        self.parts.append(text)

    def details(self, summary: str, text: str) -> None:
        self.parts.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")

    def write(self, path: Path) -> None:
        """The whole page, atomically; folders are made."""
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        body = f"<h1>{title}</h1>" + "\n".join(self.parts)
        head += f"<style>{STYLE}{self.style}</style>"
        page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; none where it has not logged."""
    from ldmseg_fast.files import read_lines

    return read_lines(run / LOG)


def curves(run: Path) -> bytes:
    """Loss (log axis) and validation PQ of a run against the step, as a PNG.

    Raises:
        ArgumentError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ArgumentError("the curves of a run need matplotlib: pip install 'ldmseg_fast[demo]'") from None

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
    """The newest picture grid of a run's validation."""
    pictures = sorted((run / "pictures").glob("step-*.png"))
    return pictures[-1].read_bytes() if pictures else None


def write_run_report(run: Path, path: Path) -> Path:
    """Curves, newest pictures and settings of one training run, as one HTML page.

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
        page.details("settings", settings.read_text(encoding="utf-8"))
    page.write(path)
    return path


def quality_rows(report: dict[str, Any]) -> list[list[str]]:
    """Rows of name, PQ, SQ, RQ for the model and the baselines of an evaluation report."""
    named = {"model": report["class_agnostic"]} | report["baselines"]
    return [[name, *(f"{row[key]:.1f}" for key in ("pq", "sq", "rq"))] for name, row in named.items()]
