"""Writes maps as palette PNGs of one byte a pixel, which every viewer shows in colours.

The palette is PASCAL VOC's (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, VOCcode/VOClabelcolormap.m), with the
categories' own colours where they have some.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.drawn import voc_colours
from ldmseg_fast.formats.options import Summary, WriteOptions
from ldmseg_fast.formats.walk import Walk

MOST = 255  # values of one byte beside 0, void


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/SPLIT/images, labels and instances, with NAME.png of each picture, and OUT/categories.json.

    A pixel of `labels` has its category's id in categories.json: the source's where all lie in 1..255, else the place
    in the list, from 1. `ldmseg data import semantic` reads these. A pixel of `instances` has the place of its segment
    in ascending id, from 1. 0 is void.

    Raises:
        DataError: over 255 categories, or over 255 segments in one picture; a map that cannot be read; names that would
            replace each other.
    """
    values = category_values(data_set.categories)
    walk = Walk(data_set, options)
    colours = np.array(voc_colours(), np.uint8)
    by_category = colours.copy()
    for category in data_set.categories:
        if "color" in category:
            by_category[values[category["id"]]] = category["color"]
    listed = [{**each, "id": values[each["id"]], "source_id": each["id"]} for each in data_set.categories]
    write_json(out / "categories.json", {"categories": listed, "void": [0]})
    for item in walk.items("palette"):
        segments = item.map.segments
        item.put_picture(out / item.split / "images" / item.name, options)
        if len(segments) > MOST:
            raise DataError(
                f"{item.name}: {len(segments)} segments, a palette has {MOST}; export coco-panoptic instead"
            )
        place = np.searchsorted([segment["id"] for segment in segments], item.map.ids)
        table = np.array([*(values[segment["category_id"]] for segment in segments), 0], np.uint8)
        void = item.map.ids == 0
        for name, pixels, palette in (
            ("labels", np.where(void, 0, table[place]), by_category),
            ("instances", np.where(void, 0, place + 1), colours),
        ):
            save(out / item.split / name / f"{item.stem}.png", pixels.astype(np.uint8), palette)
        crowds = sum(bool(segment.get("iscrowd")) for segment in segments)
        walk.leave_out("marks of crowds; their pixels are there", crowds, item.name)
        walk.leave_out("scores of segments", sum("score" in segment for segment in segments), item.name)
    return walk.summary(out)


def category_values(categories: Sequence[Mapping[str, Any]], most: int = MOST) -> dict[int, int]:
    """Gives every category a value in 1..most: its id where all ids lie there, else its place in the list, from 1.

    Raises:
        DataError: more categories.
    """
    if len(categories) > most:
        raise DataError(f"{len(categories)} categories, its PNGs have values for {most}; export coco-panoptic instead")
    ids = [category["id"] for category in categories]
    return {each: each if min(ids) > 0 and max(ids) <= most else place for place, each in enumerate(ids, 1)}


def save(path: Path, pixels: np.ndarray, palette: np.ndarray | None) -> None:
    """Writes a PNG of values, uint8 or uint16 [H, W]: with a palette, uint8 [256, 3], or grey.

    Raises:
        OSError: a file that cannot be written.
    """
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    buffer = io.BytesIO()  # Pillow's own error does not tell a full disk from another fault
    image.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
