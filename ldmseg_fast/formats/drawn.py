"""Helps with tools in which people draw: shapes with labels, one above the other, on a picture as it is shown."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from ldmseg_fast.data.orientation import TURNS, orientation_of, turned
from ldmseg_fast.data.pictures import open_checked, read_content
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet
from ldmseg_fast.formats.instances import with_options
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.painting import Mask, paint
from ldmseg_fast.formats.trees import Tree
from ldmseg_fast.panoptic.format import MAX_PIXELS

CATEGORIES = "categories.json"


@dataclass(frozen=True)
class Shape:
    """Holds one shape as it was drawn.

    Attributes:
        pixels: bool [H, W].
        label: name of its category; None: it makes void what lies below it.
        group: shapes of one label and one group are one segment; None: a segment of its own.
        iscrowd: whether it stands for several instances.
        score: of a prediction.
        name: what an error calls it.
    """

    pixels: np.ndarray
    label: str | None
    group: Hashable = None
    iscrowd: bool = False
    score: float | None = None
    name: str = ""


def categories_of(
    labels: Iterable[str],
    options: ReadOptions,
    *,
    stuff: Iterable[str] = (),
    known: Iterable[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Lists the categories that labels name.

    Args:
        labels: all that occur; those that are not known get the next ids in alphabetical order.
        options: `things` and `connected` say which are things; without `things` all new ones are but `stuff`.
        stuff: labels that the source itself marks as stuff.
        known: what `known_categories` has found.

    Raises:
        ArgumentError: an option names a label that does not occur.
    """
    flat, listed = set(stuff), list(known)
    names = sorted(set(labels) - {category["name"] for category in listed})
    after = max((category["id"] for category in listed), default=0) + 1
    listed += [
        {"id": number, "name": name, "isthing": int(name not in flat)} for number, name in enumerate(names, after)
    ]
    return with_things(listed, options)


def known_categories(tree: Tree) -> list[dict[str, Any]]:
    """Reads categories.json, which our writers put beside what a tool reads: ids, names, and which are things.

    Returns:
        COCO's entries; none where there is no such file, or one of somebody else.

    Raises:
        DataError: a file that cannot be read, or an `isthing` that is neither 0 nor 1.
    """
    if CATEGORIES not in tree:
        return []
    content = tree.json(CATEGORIES)
    if isinstance(content, dict):
        content = content.get("categories")
    listed = [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []
    ours = [each for each in listed if type(each.get("id")) is int and isinstance(each.get("name"), str)]
    for each in ours:
        if each.get("isthing", 1) not in (0, 1):
            raise DataError(
                f"{tree.where(CATEGORIES)}: {each['name']}: isthing {each['isthing']!r:.80}: 0 or 1 expected"
            )
    return [{**each, "isthing": int(each.get("isthing", 1))} for each in ours]


def with_things(categories: list[dict[str, Any]], options: ReadOptions) -> list[dict[str, Any]]:
    """Returns the categories as `options.things` and `options.connected` change them.

    Raises:
        ArgumentError: an option names a category that is not there.
    """
    return with_options(DataSet(categories, {}), options).categories


def names_of(categories: Iterable[Mapping[str, Any]], void: Iterable[str] = ()) -> dict[int, str]:
    """Returns the name of each category id, for a format that knows categories by name alone.

    Args:
        categories: COCO's entries.
        void: names that mean no category there.

    Raises:
        DataError: two categories of one name, or one that is called as void is.
    """
    names: dict[int, str] = {}
    for category in categories:
        if category["name"] in names.values():
            raise DataError(f"two categories are called {category['name']!r}; this format needs names that differ")
        if category["name"] in void:
            raise DataError(f"category {category['name']!r}: means void in this format; rename it")
        names[category["id"]] = category["name"]
    return names


def score_of(entry: Mapping[str, Any]) -> float | None:
    """Returns the `score` of a shape; None where it has none that is a number."""
    score = entry.get("score")
    return float(score) if is_number(score) else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Tells whether a value of a JSON is a number that a float holds: no text, NaN, infinity or 400 digits."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def paint_in_order(
    shapes: Iterable[Shape], categories: Iterable[Mapping[str, Any]], height: int, width: int
) -> AnnotatedMap:
    """Paints shapes into a map, int32 [height, width]; what was drawn later lies above.

    Raises:
        DataError: a shape of another size.
    """
    named = {category["name"]: category for category in categories}
    keys: dict[Hashable, int] = {}  # segment -> number
    first: dict[int, Shape] = {}

    def masks() -> Iterable[Mask]:
        for place, shape in enumerate(shapes):
            if shape.label is None:
                key: Hashable = None
            elif not named[shape.label]["isthing"] and not shape.iscrowd:
                key = shape.label
            else:
                key = shape.label, place if shape.group is None else ("group", shape.group)
            number = keys.setdefault(key, len(keys) + 1)
            first.setdefault(number, shape)
            yield Mask(shape.pixels, number, isthing=False, name=shape.name)  # as stuff, masks of one number are one

    painted = paint(masks(), height, width, ordered=True)
    segments = []
    for segment in painted.segments:
        shape = first[segment["category_id"]]
        if shape.label is None:
            painted.ids[painted.ids == segment["id"]] = 0
            continue
        score = {} if shape.score is None else {"score": shape.score}
        category_id = named[shape.label]["id"]
        segments.append({"id": segment["id"], "category_id": category_id, "iscrowd": int(shape.iscrowd), **score})
    return replace(painted, segments=segments)


def shown_size(picture: Any, name: str) -> tuple[int, int, int]:
    """Reads the size of a picture as tools show it, and the EXIF orientation that they turn it by.

    Args:
        picture: of an `Entry`.
        name: for the error.

    Returns:
        H, W and the orientation, 1 to 8.

    Raises:
        DataError: no picture.
    """
    if isinstance(picture, Path):
        content, name = read_content(picture), str(picture)
    else:
        content = picture if isinstance(picture, bytes) else picture()
    with open_checked(name, content, MAX_PIXELS) as image:
        turn = orientation_of(image)
        swapped = turn >= 5 and image.format != "TIFF"  # Pillow gives the shown size of these
        height, width = (image.width, image.height) if swapped else (image.height, image.width)
    return height, width, turn


def check_size(said: tuple[Any, Any], height: int, width: int, where: str) -> None:
    """Checks the size that an annotation was drawn on.

    Args:
        said: (H, W) by the annotation; None where it does not say.
        height, width: of the picture as it is shown.
        where: for the error.

    Raises:
        DataError: another size.
    """
    if said != (None, None) and said != (height, width):
        raise DataError(
            f"{where}: drawn on {said[1]!r:.40}x{said[0]!r:.40} pixels, its picture has {width}x{height}; take the "
            "picture that it was drawn on"
        )


def as_shown(ids: np.ndarray, turn: int) -> np.ndarray:
    """Turns a map of the stored pixels, int32 [H, W], as an EXIF orientation turns the picture."""
    return ids if turn not in TURNS else np.array(Image.fromarray(ids).transpose(TURNS[turn]), np.int32)


def as_stored(annotated: AnnotatedMap, turn: int) -> AnnotatedMap:
    """Turns the map, int32 [H, W], of a picture as it is shown back to the stored pixels."""
    if turn not in TURNS:
        return annotated
    back = turned(Image.fromarray(annotated.ids), turn, exif=False, by_itself=True)
    return replace(annotated, ids=np.array(back, np.int32))


@cache
def voc_colours(count: int = 256) -> tuple[tuple[int, int, int], ...]:
    """Lists PASCAL VOC's colours, black first (host.robots.ox.ac.uk/pascal/VOC, VOCcode/VOClabelcolormap.m).

    The bits of a number are dealt to red, green and blue in turn, into their upper bits first. Beyond 256 they come
    again.
    """
    return tuple(
        (_dealt(number % 256), _dealt(number % 256 >> 1), _dealt(number % 256 >> 2)) for number in range(count)
    )


def _dealt(number: int) -> int:
    return sum((number >> 3 * bit & 1) << 7 - bit for bit in range(3))
