"""Writes names on overlays, and a legend below them."""

from __future__ import annotations

import colorsys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.reports.draw import overlay

GOLDEN = 0.6180339887  # steps of the hue by it stay apart however many there are
STRIPES = 4  # of colours in a square of the legend, at most
COARSE = 96  # pixels of the longer side on which places for names are looked for
RGB = tuple[int, int, int]
INK, PAPER = (255, 255, 255), (30, 32, 36)


def named_overlay(
    image: np.ndarray, segmentation: np.ndarray, segments: Sequence[Mapping[str, Any]], table: CategoryTable
) -> np.ndarray:
    """Tints a picture by what its segments are, writes their names on them, and adds a legend.

    The first thing of a category has the category's colour, each further one another hue. A name that has no room in
    its segment is in the legend alone.

    Args:
        image: uint8 [H, W, 3].
        segmentation: integer [H, W], 0 void.
        segments: its `segments_info`, with `category_id`.
        table: names and colours.

    Returns:
        uint8 [H + legend, W, 3].
    """
    of_id = {category.id: category for category in table.categories}
    known = [segment for segment in segments if segment["category_id"] in of_id]
    colors = np.full((int(segmentation.max(initial=0)) + 1, 3), 128, np.uint8)
    used: defaultdict[int, list[RGB]] = defaultdict(list)
    for segment in known:
        category = of_id[segment["category_id"]]
        color = hue_turned(category.color, len(used[category.id]))
        used[category.id].append(color)
        colors[segment["id"]] = color
    picture = Image.fromarray(overlay(image, segmentation, colors=colors[segmentation]))
    size = max(12, min(picture.size) // 28)
    write_names(picture, segmentation, known, {each["id"]: of_id[each["category_id"]].name for each in known}, size)
    entries = [
        (_short(of_id[key].name) + (f" ({len(own)})" if len(own) > 1 else ""), own[:STRIPES])
        for key, own in used.items()
    ]
    return np.asarray(_with_legend(picture, entries, size))


def hue_turned(color: RGB, steps: int) -> RGB:
    """Turns a colour's hue by so many steps of the golden ratio; greys become colours."""
    if steps == 0:
        return color
    hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in color))
    turned = colorsys.hsv_to_rgb((hue + steps * GOLDEN) % 1, max(saturation, 0.5), max(value, 0.5))
    red, green, blue = (round(255 * part) for part in turned)
    return red, green, blue


def _short(name: str) -> str:
    """Puts a name on one line of at most 32 characters."""
    name = " ".join(name.split())
    return name if len(name) <= 32 else name[:31] + "\N{HORIZONTAL ELLIPSIS}"


def write_names(
    picture: Image.Image,
    segmentation: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    size: int,
) -> None:
    """Writes names on a picture, those of larger segments first; none covers another.

    Args:
        picture: that is written on.
        segmentation: integer [H, W] of its size.
        segments: entries with `id` and `area`.
        names: of the segments, by id.
        size: of the letters, in pixels.
    """
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    step = max(1, -(-max(segmentation.shape) // COARSE))
    coarse = segmentation[step // 2 :: step, step // 2 :: step]
    taken: list[tuple[float, float, float, float]] = []
    for segment in sorted(segments, key=lambda segment: -segment["area"]):
        place = _innermost(coarse == segment["id"])
        if place is None:
            continue
        row, column, inside = place
        name = _short(names[segment["id"]])
        width, height = draw.textlength(name, font=font), size
        if 2 * inside * step < height:
            continue
        x = min(max((column + 0.5) * step, width / 2 + 2), picture.width - width / 2 - 2)
        y = min(max((row + 0.5) * step, height / 2 + 2), picture.height - height / 2 - 2)
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        draw.text((x, y), name, fill=INK, font=font, anchor="mm", stroke_width=max(2, size // 8), stroke_fill=PAPER)


def _innermost(mask: np.ndarray) -> tuple[int, int, int] | None:
    """Finds the pixel of a mask, bool [h, w], that is farthest from its edge: row, column, and how far.

    The mask is eroded until nothing is left; of the last pixels the middle one is taken.
    """
    if not mask.any():
        return None
    depth = 0
    inner = mask
    while inner.any():
        mask, depth = inner, depth + 1
        padded = np.pad(inner, 1)
        inner = inner & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    rows, columns = np.nonzero(mask)
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return int(rows[middle]), int(columns[middle]), depth


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, Sequence[RGB]]], size: int) -> Image.Image:
    """Adds rows of coloured squares with names below a picture."""
    if not entries:
        return picture
    font, gap = ImageFont.load_default(size), size // 2
    line = size + gap
    places, x, y = [], gap, gap
    for name, colors in entries:
        width = size + gap + int(font.getlength(name)) + 2 * gap
        if x > gap and x + width > picture.width:
            x, y = gap, y + line
        places.append((x, y, name, colors))
        x += width
    sheet = Image.new("RGB", (picture.width, picture.height + y + line), PAPER)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for x, top, name, colors in places:
        y = picture.height + top
        for stripe, color in enumerate(colors):
            start, end = (x + size * k // len(colors) for k in (stripe, stripe + 1))
            draw.rectangle((start, y, end - 1, y + size - 1), fill=color)
        draw.text((x + size + gap, y + size / 2), name, fill=INK, font=font, anchor="lm")
    return sheet
