"""Paints LabelMe's shapes as LabelMe does (https://github.com/wkentaro/labelme, labelme/utils/shape.py), and finds the
polygons that it paints to given pixels.

Points are x, y in pixels. Pillow paints, and what a shape's line touches belongs to it.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldmseg_fast.data.pictures import open_checked
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.drawn import Shape, score_of
from ldmseg_fast.panoptic.format import MAX_PIXELS
from ldmseg_fast.panoptic.outlines import Ring, fill, polygons_of

AREAS = {"polygon": (), "rectangle": (2, 4), "circle": (2,), "oriented_rectangle": (4,), "mask": (2,)}  # their points
NO_AREA = "shapes without an area, such as points and lines"
SHORT = "polygons of under 3 points"
VOID = ("_background_", "__ignore__")  # labels that stand for no category, by custom of LabelMe
_FAR = 2**17  # pixels; no shape reaches further


def shapes_of(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the shapes of a JSON.

    Raises:
        DataError: no list of shapes, or one without a label.
    """
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise DataError(f"{where}: `shapes` must be a list, got {shapes!r:.80}")
    for place, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"]:
            raise DataError(f"{where}: shapes[{place}] has no label, got {shape!r:.80}; give it one")
        if not isinstance(shape.get("flags") or {}, dict):
            raise DataError(f"{where}: shapes[{place}]: flags must be an object, got {shape['flags']!r:.80}")
    return shapes


def drawn_shapes(
    shapes: list[dict[str, Any]], height: int, width: int, where: str, left_out: Counter[str]
) -> Iterator[Shape]:
    """Paints the shapes of a picture in their order.

    Args:
        shapes: from `shapes_of`.
        height, width: of the picture as it is shown, in pixels.
        where: for the error.
        left_out: counts shapes without an area.

    Raises:
        DataError: points that are no numbers or too few or many, or a damaged mask.
    """
    for place, shape in enumerate(shapes):
        kind, here = shape.get("shape_type") or "polygon", f"{where}: shapes[{place}] ({shape['label']})"
        if not isinstance(kind, str) or kind not in AREAS:
            left_out[NO_AREA] += 1
            continue
        points = _points(shape.get("points"), here)
        if kind == "polygon" and len(points) < 3:
            left_out[SHORT] += 1
            continue
        if AREAS[kind] and len(points) not in AREAS[kind]:
            raise DataError(f"{here}: a {kind} has {AREAS[kind][0]} points, got {len(points)}; draw it again")
        if kind == "mask":
            pixels = _pasted(shape.get("mask"), points, height, width, here)
        else:
            pixels = _painted(kind, points, height, width)
        flags = shape.get("flags") or {}
        group = shape.get("group_id")
        if not isinstance(group, int | str | None):
            raise DataError(f"{here}: group_id must be a number, got {group!r:.80}")
        yield Shape(
            pixels,
            None if shape["label"] in VOID else shape["label"],
            group,
            flags.get("crowd") is True,
            score_of(shape),
            here,
        )


def _points(points: Any, where: str) -> list[tuple[float, float]]:
    if not isinstance(points, list):
        raise DataError(f"{where}: points must be a list of [x, y], got {points!r:.80}")
    found = []
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(type(value) in (int, float) for value in point):
            raise DataError(f"{where}: a point must be [x, y], got {point!r:.80}")
        if not all(abs(value) <= _FAR for value in point):  # false of NaN too
            raise DataError(
                f"{where}: the point {point!r:.80} is no number, or far outside of every picture; draw it again"
            )
        found.append((float(point[0]), float(point[1])))
    return found


def _painted(kind: str, points: list[tuple[float, float]], height: int, width: int) -> np.ndarray:
    """Paints a shape with its line, as LabelMe does."""
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    if kind == "circle":
        (x, y), (rim_x, rim_y) = points
        radius = math.hypot(rim_x - x, rim_y - y)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    elif kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=1, outline=1)
    else:
        draw.polygon(points, fill=1, outline=1)
    return np.array(image, bool)


def _pasted(encoded: Any, points: list[tuple[float, float]], height: int, width: int, where: str) -> np.ndarray:
    """Places a mask's own picture, whose upper left and lower right pixel `points` name."""
    if not isinstance(encoded, str):
        raise DataError(f"{where}: a mask is a PNG in base64, got {encoded!r:.80}")
    with open_checked(f"{where}: mask", from_base64(encoded, where), MAX_PIXELS) as image:
        try:
            patch: np.ndarray = np.array(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: its mask is damaged ({error}); draw it again") from None
    if patch.ndim == 3:
        patch = patch[..., :3].max(2)
    (left, top), (right, bottom) = ([math.floor(value + 0.5) for value in point] for point in points)
    if max(abs(right - left + 1 - patch.shape[1]), abs(bottom - top + 1 - patch.shape[0])) > 1:
        raise DataError(
            f"{where}: its mask is {patch.shape[1]}x{patch.shape[0]}, the points are those of "
            f"{right - left + 1}x{bottom - top + 1} pixels; draw it again"
        )
    mask = np.zeros((height, width), bool)
    part = patch[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    mask[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]] = part > 0
    return mask


def take_polygons(rings: list[Ring], mask: np.ndarray, left: int, top: int) -> Iterator[list[list[float]]]:
    """Gives polygons that LabelMe paints to exactly one piece of a segment, and takes these pieces out of its mask.

    Args:
        rings: of the segment.
        mask: its pixels, bool [h, w], where `left`, `top` is the first.
        left, top: in pixels.
    """
    for polygon in polygons_of(rings):
        if len(polygon) > 1:
            continue
        pixels = _border(polygon[0].points - [left, top])
        if len(pixels) < 3:
            continue
        painted = _painted("polygon", [(x + 0.5, y + 0.5) for x, y in pixels], *mask.shape)
        if (painted == fill([polygon[0].points - [left, top]], *mask.shape)).all():
            mask &= ~painted
            yield [[x + left + 0.5, y + top + 0.5] for x, y in pixels]


def _border(corners: np.ndarray) -> list[tuple[int, int]]:
    """Lists the pixels along the inside of an outer ring where its line turns."""
    after = np.roll(corners, -1, axis=0)
    pixels: list[tuple[int, int]] = []
    for (x0, y0), (x1, y1) in zip(corners.tolist(), after.tolist()):
        # the inside lies on the right hand: below a line to the right, to the left of one that goes down
        if y0 == y1:
            row = y0 if x1 > x0 else y0 - 1
            ends = [(x0, row), (x1 - 1, row)] if x1 > x0 else [(x0 - 1, row), (x1, row)]
        else:
            column = x0 - 1 if y1 > y0 else x0
            ends = [(column, y0), (column, y1 - 1)] if y1 > y0 else [(column, y0 - 1), (column, y1)]
        pixels += [pixel for pixel in ends if not pixels or pixel != pixels[-1]]
    return pixels[:-1] if len(pixels) > 1 and pixels[0] == pixels[-1] else pixels


def png_of(mask: np.ndarray) -> str:
    """Encodes a mask, bool [H, W], as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_base64(text: str, where: str) -> bytes:
    """Decodes base64.

    Raises:
        DataError: it is damaged; it names `where`.
    """
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: damaged base64 ({error}); save it again") from None
