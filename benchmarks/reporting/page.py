"""Writes the offline page: every plot and table in one HTML file, in light and in dark, for a screen or a phone."""

from __future__ import annotations

import html
from pathlib import Path

from benchmarks.reporting.plots import PLOTS
from benchmarks.reporting.rows import RESULTS, load_rows
from benchmarks.reporting.scaling_tables import scaling_section
from benchmarks.reporting.tables import machine, sources, suite_table
from ldmseg_fast.reports.page import Page

SUITES = ("latency", "throughput", "training", "data", "evaluation", "export", "quality")
STYLE = """
.wide { overflow-x: auto; } .wide svg { display: block; width: 100%; min-width: 34rem; height: auto; }
.wide table { white-space: nowrap; font-size: .85rem; margin: .4rem 0; } details { margin: .5rem 0; }
summary { cursor: pointer; padding: .35rem 0; }
@media (max-width: 46rem) { body { margin: 1rem auto; padding: 0 .8rem; } h1 { font-size: 1.4rem; } }
"""


def write_page(path: Path, folder: Path = RESULTS) -> None:
    """Writes the page of all results in `folder`. Needs matplotlib."""
    page = Page("What was measured", style=STYLE)
    page.text("Times are medians of interleaved runs; a ratio is taken against the baseline of the same run.", "note")
    for title, suite, plot in PLOTS:
        rows = load_rows(suite, folder) or (load_rows("gpu", folder) if suite == "kernels" else [])
        page.heading(title)
        svg = plot(rows)
        if svg is None:
            page.text(f"Not measured yet: benchmarks/bench_{suite}.py", "note")
        else:
            where = machine(rows) or "data-sheet values, not measured yet"
            caption = f"<figcaption>{html.escape(where)}</figcaption>"
            page.markup(f'<figure><div class="wide">{svg}</div>{caption}</figure>')
    page.heading("Tables")
    for suite in SUITES:
        if made := suite_table(suite, folder):
            files = "\n\n".join(sources(load_rows(suite, folder)))
            page.markup(folded(suite, f"{made}\n{files}"))
    page.markup(folded("scaling, on paper", scaling_section(folder)))
    page.write(path)


def folded(summary: str, markdown: str) -> str:
    """Returns tables and paragraphs of Markdown as HTML behind a line that opens them."""
    inner = Page("")
    for block in markdown.strip().split("\n\n"):
        if not block.startswith("|"):
            inner.text(block.replace("`", ""), "note")
            continue
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines())
        inner.markup('<div class="wide">')
        inner.table(header, rows)
        inner.markup("</div>")
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(inner.parts)}</details>"
