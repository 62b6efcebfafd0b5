"""Writes the page of errors as HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.reports.error_entry import PageEntry, descriptions, image_quality, lookup
from ldmseg_fast.reports.error_pictures import SCRIPT, STYLE, color_key, embedded, pictures
from ldmseg_fast.reports.page import Page


def write_error_page(
    path: str | Path, sections: Mapping[str, Sequence[PageEntry | str]], title: str, note: str = ""
) -> None:
    """Writes the page, with a heading for each section.

    Args:
        path: the HTML file; its folder is made.
        sections: heading -> images, or what `render_entry` made of them.
        title, note: at the top.
    """
    page = Page(title, style=STYLE)
    page.text(note, "note")
    page.markup(color_key())
    for heading, entries in sections.items():
        page.heading(heading)
        for entry in entries:
            page.markup(entry if isinstance(entry, str) else render_entry(entry))
    page.markup(f"<script>{SCRIPT}</script>")
    page.write(Path(path))


def worst_places(qualities: Mapping[int, float], count: int) -> list[int]:
    """Returns the places of the `count` lowest qualities, the lowest first; of equal ones the first of the split."""
    return sorted(qualities, key=lambda place: (qualities[place], place))[:count]


def random_places(images: int, count: int, seed: int) -> list[int]:
    """Draws `count` of the first `images` whole numbers, ascending; they depend on the arguments alone."""
    return sorted(np.random.default_rng(seed).permutation(images)[:count].tolist())


def write_worst_and_random(
    path: str | Path,
    drawn: Mapping[int, str],
    worst: Sequence[int],
    random: Sequence[int],
    title: str,
    images: int,
    by_category: bool,
) -> None:
    """Writes the page of an evaluation over `images` images.

    drawn: what `render_entry` made of those at `worst` and `random`.
    """
    sections = {
        f"The {len(worst)} worst images": [drawn[place] for place in worst],
        f"{len(random)} random images": [drawn[place] for place in random],
    }
    kind = "by category" if by_category else "class-agnostic"
    note = f"{images} images, matched {kind}. An image's PQ is over its segments of all categories."
    write_error_page(path, {heading: entries for heading, entries in sections.items() if entries}, title, note)


def render_entry(entry: PageEntry) -> str:
    """Renders one image as HTML: four pictures, a line that tells what the pointer is on, a table of segments.

    Raises:
        ArgumentError: picture and maps of different sizes.
    """
    sizes = {entry.gt_ids.shape, entry.pred_ids.shape} | ({entry.image.shape[:2]} if entry.image is not None else set())
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ArgumentError(f"{entry.name}: picture, truth and prediction must have one size, not {listed}")
    pairs, missed, false = entry.pairs(), entry.missed(), entry.false()
    views = "".join(
        f'<figure><div class="view"><img alt="{caption} of {html.escape(entry.name)}" src="{embedded(picture)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
        for caption, picture in zip(("image", "truth", "prediction", "errors"), pictures(entry))
    )
    truth, prediction = descriptions(entry)
    quality = image_quality(entry.matches)
    summary = f"PQ {100 * quality:.1f} · " if not math.isnan(quality) else ""
    summary += f"{len(pairs)} of {len(pairs) + len(missed)} segments found, {len(missed)} missed, {len(false)} false"
    rows = [("truth", text) for text in truth.values()] + [("prediction", text) for text in prediction.values()]
    table = "".join(f"<tr><td>{side}</td><td>{html.escape(text)}</td></tr>" for side, text in rows)
    data = json.dumps(lookup(entry, truth, prediction), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"<article><h3>{html.escape(entry.name)}<span>{summary}</span></h3>"
        f'<div class="four">{views}</div><output>Point at a segment, or tap it.</output>'
        f"<details><summary>segments</summary><table>{table}</table></details>"
        f'<script type="application/json">{data}</script></article>'
    )
