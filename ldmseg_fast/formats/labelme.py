"""Reads and writes LabelMe's JSONs (https://github.com/wkentaro/labelme, docs and labelme/utils/shape.py).

A JSON lies beside its picture. Points are x, y in pixels of the picture as it is shown, which is turned by its EXIF
orientation. Shapes are painted in their order, by Pillow as LabelMe paints them: what a polygon's line touches belongs
to it.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.drawn import (
    CATEGORIES,
    as_shown,
    as_stored,
    categories_of,
    check_size,
    known_categories,
    names_of,
    paint_in_order,
    shown_size,
)
from ldmseg_fast.formats.labelme_shapes import VOID, drawn_shapes, from_base64, png_of, shapes_of, take_polygons
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.formats.trees import Tree, plain_name
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.outlines import outlines
from ldmseg_fast.panoptic.shapes import segment_shapes

SPLIT = "train"  # of JSONs that lie in no folder of a split
_NO_SPLITS = ("annotations", "images", "jsons", "labels")  # folders in which the splits lie


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads the JSONs in SRC, which are the split `train`, or those in the folders below SRC, each a split.

    Labels are categories, numbered in alphabetical order. All are things but those whose shapes have the flag `stuff`,
    and but those that `options.things` leaves out. Shapes of one label and one `group_id` are one segment.

    Args:
        source: the folder, a `.zip` of it, or one JSON.
        options: `version` has no meaning.

    Raises:
        DataError: no JSON of LabelMe.
    """
    options.one_version((), "labelme")
    tree = Tree(source)
    names = [tree.only] if tree.only else [name for name in tree.below(suffixes=[".json"]) if name != CATEGORIES]
    found: dict[str, list[str]] = {}
    labels: set[str] = set()
    stuff: set[str] = set()
    others = 0
    contents: dict[str, str] = {}
    for name in tqdm(names, desc="labelme", unit="file", disable=None):
        content = tree.json(name)
        if not isinstance(content, dict) or "shapes" not in content:
            others += 1
            continue
        for shape in shapes_of(content, tree.where(name)):
            labels.add(shape["label"])
            if (shape.get("flags") or {}).get("stuff") is True:
                stuff.add(shape["label"])
        path = content.get("imagePath")
        contents[name] = path if isinstance(path, str) and path else PurePosixPath(name).stem
        found.setdefault(_split_of(name)[0], []).append(name)
    if not found:
        raise DataError(f"{source}: no JSON of LabelMe; each picture has one with `shapes` and `imagePath`")
    categories = categories_of(labels - set(VOID), options, stuff=stuff, known=known_categories(tree))
    folders = {PurePosixPath(name).parent.as_posix() for name in contents}
    splits: dict[str, Sequence[Entry]] = {
        split: [_entry(tree, name, contents[name], categories, folders) for name in listed]
        for split, listed in found.items()
    }
    return DataSet(categories, splits, {"JSONs of other kinds": others} if others else {})


def _split_of(name: str) -> tuple[str, str]:
    """Returns the split of a JSON, and its folder below that of the split."""
    folders = list(PurePosixPath(name).parent.parts)
    while folders and folders[0] in _NO_SPLITS:
        del folders[0]
    return (folders[0], "/".join(folders[1:])) if folders else (SPLIT, "")


def _entry(tree: Tree, name: str, picture: str, categories: list[dict[str, Any]], folders: set[str]) -> Entry:
    folder = PurePosixPath(name).parent.as_posix().removeprefix(".")
    found = tree.find(picture, [folder], sorted(folders - {folder}))  # not what lies beside other JSONs
    content = tree.picture(found) if found else partial(_embedded, tree, name, picture)
    below = posixpath.join(_split_of(name)[1], PurePosixPath(plain_name(picture)).name)
    read_map = partial(_read, tree, name, content, categories)
    return Entry(below, content, read_map, sources=tree.sources(name))


def _embedded(tree: Tree, name: str, picture: str) -> bytes:
    data = tree.json(name).get("imageData")
    if not isinstance(data, str) or not data:
        raise DataError(
            f"{tree.where(name)}: its picture {picture} is not there, nor in `imageData`; put it beside the JSON"
        )
    return from_base64(data, f"{tree.where(name)}: imageData")


def _read(tree: Tree, name: str, picture: Path | Callable[[], bytes], categories: list[dict[str, Any]]) -> AnnotatedMap:
    where = tree.where(name)
    content = tree.json(name)
    height, width, turn = shown_size(picture, where)
    check_size((content.get("imageHeight"), content.get("imageWidth")), height, width, where)
    left_out: Counter[str] = Counter()
    shapes = drawn_shapes(shapes_of(content, where), height, width, where, left_out)
    painted = as_stored(paint_in_order(shapes, categories, height, width), turn)
    return AnnotatedMap(painted.ids, painted.segments, dict(Counter(painted.left_out) + left_out))


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/SPLIT/NAME.json beside each picture, and OUT/categories.json, which `read` reads.

    A segment is a shape of the type `mask`, or with `shape` "polygon" one polygon a piece. A piece that LabelMe's
    polygons do not hold exactly, such as one with a hole, is a mask then. Shapes of one segment share a `group_id`.
    Flags say `stuff` and `crowd`.

    Raises:
        DataError: a map that cannot be read, or names that would replace each other.
    """
    walk = Walk(data_set, options)
    write_json(out / CATEGORIES, data_set.categories)
    names_of(data_set.categories, VOID)
    categories = {each["id"]: each for each in data_set.categories}
    for item in walk.items("labelme"):
        path = out / item.split / item.name
        item.put_picture(path, options)
        ids = as_shown(item.map.ids, shown_size(item.place.entry.picture, item.name)[2])
        content = content_of(ids, item.map.segments, categories, path.name, options.shape)
        with replacing(out / item.split / f"{item.stem}.json") as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        masks = sum(shape["shape_type"] == "mask" for shape in content["shapes"])
        if options.shape == "polygon":
            walk.leave_out("outlines that LabelMe's polygons do not hold; their masks are there", masks, item.name)
    return walk.summary(out)


def content_of(
    ids: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    categories: Mapping[int, Mapping[str, Any]],
    picture: str,
    shape: str = "rle",
) -> dict[str, Any]:
    """Describes a map as LabelMe does.

    Args:
        ids: integer [H, W], 0 void, of the picture as it is shown.
        segments: its segments, with `id`, `category_id` and `iscrowd`.
        categories: with `name` and `isthing`, by id.
        picture: its file, relative to the JSON.
        shape: "polygon" for polygons where they hold a piece exactly, otherwise masks.

    Returns:
        What the JSON holds.
    """
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(_written(ids, segments, categories, shape)),
        "imagePath": picture,
        "imageData": None,
        "imageHeight": ids.shape[0],
        "imageWidth": ids.shape[1],
    }


def _written(
    ids: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    categories: Mapping[int, Mapping[str, Any]],
    kind: str,
) -> Iterator[dict[str, Any]]:
    boxes = {shape["id"]: shape["bbox"] for shape in segment_shapes(ids)}
    rings = outlines(ids) if kind == "polygon" else {}
    for segment in segments:
        category = categories[segment["category_id"]]
        flags = {"stuff": not category["isthing"], "crowd": bool(segment.get("iscrowd"))}
        shape = {"label": category["name"], "group_id": segment["id"], "description": "", "flags": flags}
        if "score" in segment:
            shape["score"] = segment["score"]
        left, top, width, height = boxes[segment["id"]]
        mask = ids[top : top + height, left : left + width] == segment["id"]
        for points in take_polygons(rings.get(segment["id"], []), mask, left, top):
            yield {**shape, "shape_type": "polygon", "points": points, "mask": None}
        if mask.any():
            corners = [[left, top], [left + width - 1, top + height - 1]]
            yield {**shape, "shape_type": "mask", "points": corners, "mask": png_of(mask)}
