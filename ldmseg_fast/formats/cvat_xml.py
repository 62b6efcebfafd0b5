"""Reads "CVAT for images 1.1" (https://docs.cvat.ai/docs/other/xml_format): polygons, masks, boxes and ellipses with
their `z_order`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.drawn import (
    Shape,
    as_stored,
    categories_of,
    check_size,
    known_categories,
    paint_in_order,
    shown_size,
)
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.trees import Tree, check_one_name, plain_name
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons

NO_AREA = "shapes without an area, such as points and lines"
_KINDS = ("polygon", "mask", "box", "ellipse")
_OTHERS = ("polyline", "points", "cuboid", "skeleton")


def read(tree: Tree, names: Sequence[str], options: ReadOptions) -> DataSet:
    """Reads XMLs of a tree; `subset` of an image is its split, `default` where it has none.

    Shapes of one label and one `group_id` are one segment. Those with a higher `z_order` lie above, and of one
    `z_order` the later.

    Raises:
        DataError: a file that is no such XML, one of "CVAT for video", or one that declares entities.
    """
    roots = {name: _root(tree, name) for name in names}
    labels = {
        (label.text or "").strip() for root in roots.values() for label in root.iterfind("./meta//labels/label/name")
    }
    images = [(name, image) for name, root in roots.items() for image in root.iterfind("image")]
    labels |= {shape.get("label", "") for _, image in images for shape in image if shape.tag in _KINDS}
    categories = categories_of(labels - {""}, options, known=known_categories(tree))
    splits: dict[str, list[Entry]] = {}
    met: dict[str, str] = {}
    roots_of = [name.rpartition("/")[0] for name in names]
    for name, image in images:
        split = image.get("subset") or "default"
        folder = name.rpartition("/")[0]
        start = f"{folder}/" if folder else ""
        file_name = image.get("name", "")
        where = f"{tree.where(name)}: image {image.get('id')!r} ({file_name})"
        if not file_name:
            raise DataError(f"{where}: has no name")
        folders = [f"{start}images/{split}", f"{start}images", folder, f"{start}{split}"]
        found = tree.find(file_name, folders, [root for root in roots_of if not f"{folder}/".startswith(f"{root}/")])
        if found is not None:
            task = f" of task {image.get('task_id')}" if image.get("task_id") else ""
            check_one_name(met, found, f"{plain_name(file_name)}{task}", where)
        picture = tree.picture(found or f"{start}images/{plain_name(file_name)}")
        read_map = partial(_read, image, picture, categories, where)
        entry = Entry(plain_name(file_name), picture, read_map, sources=tree.sources(name))
        splits.setdefault(split, []).append(entry)
    if not splits:
        raise DataError(f"{tree.where(names[0])}: no images in it; export as CVAT for images 1.1")
    return DataSet(categories, dict(splits))


class _EntitiesError(Exception):
    """Marks an XML with a document type, in which entities may be declared, in whatever encoding."""


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise _EntitiesError


def _root(tree: Tree, name: str) -> ElementTree.Element:
    content = tree.read(name, "XML")
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_Builder()))
    except _EntitiesError:
        raise DataError(f"{tree.where(name)}: declares entities, which CVAT does not; do not trust this file") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise DataError(f"{tree.where(name)}: damaged XML ({error}); export it again") from None
    if root.tag != "annotations":
        raise DataError(f"{tree.where(name)}: <{root.tag:.40}> is not CVAT's <annotations>")
    if root.find("track") is not None:
        raise DataError(f"{tree.where(name)}: tracks of CVAT for video; export as CVAT for images 1.1")
    return root


def _read(image: ElementTree.Element, picture: Any, categories: list[dict[str, Any]], where: str) -> AnnotatedMap:
    height, width, turn = shown_size(picture, where)
    check_size((_whole(image, "height", where), _whole(image, "width", where)), height, width, where)
    left_out: Counter[str] = Counter({NO_AREA: sum(shape.tag in _OTHERS for shape in image)})
    shapes = [shape for shape in image if shape.tag in _KINDS]
    shapes.sort(key=lambda shape: _whole(shape, "z_order", where, 0))
    painted = as_stored(paint_in_order(_drawn(shapes, height, width, where), categories, height, width), turn)
    return AnnotatedMap(painted.ids, painted.segments, dict(Counter(painted.left_out) + left_out))


def _drawn(shapes: Sequence[ElementTree.Element], height: int, width: int, where: str) -> Iterator[Shape]:
    for place, shape in enumerate(shapes):
        here = f"{where}, {shape.tag} {place} ({shape.get('label')})"
        if not shape.get("label"):
            raise DataError(f"{here}: has no label")
        if shape.tag == "mask":
            pixels = _mask(shape, height, width, here)
        else:
            pixels = mask_of_polygons([_outline(shape, here)], height, width, here)
        yield Shape(pixels, shape.get("label", ""), shape.get("group_id") or None, name=here)


def _outline(shape: ElementTree.Element, where: str) -> np.ndarray:
    """Lists the corners of a shape in pixels, float [N, 2]."""
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in shape.get("points", "").split(";") if pair.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise DataError(f"{where}: points must be x,y;x,y;..., got {shape.get('points')!r:.80}")
        return np.array([[_float(value, where) for value in pair] for pair in pairs], float).reshape(-1, 2)
    if shape.tag == "box":
        x0, y0, x1, y1 = (_float(shape.get(key), where) for key in ("xtl", "ytl", "xbr", "ybr"))
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    else:
        x, y, rx, ry = (_float(shape.get(key), where) for key in ("cx", "cy", "rx", "ry"))
        angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
        corners = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)
    turn = math.radians(_float(shape.get("rotation", "0"), where))
    if turn == 0:
        return corners
    centre = (corners.min(0) + corners.max(0)) / 2
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])  # clockwise on the screen
    return (corners - centre) @ matrix + centre


def _mask(shape: ElementTree.Element, height: int, width: int, where: str) -> np.ndarray:
    """Decodes run lengths along the rows of a box, which begin with a run of zeros."""
    left, top, columns, rows = (_whole(shape, key, where) for key in ("left", "top", "width", "height"))
    if min(left, top, columns, rows) < 0 or top + rows > height or left + columns > width:
        raise DataError(f"{where}: its box {left},{top} {columns}x{rows} leaves the picture of {width}x{height}")
    try:
        runs = np.array([int(run) for run in shape.get("rle", "").split(",") if run.strip()], np.int64)
    except (ValueError, OverflowError):
        raise DataError(f"{where}: rle must be whole numbers, got {shape.get('rle')!r:.80}") from None
    missing = 0
    if not (runs < 0).any() and not (runs > rows * columns).any():
        missing = rows * columns - int(runs.sum())
    if missing > 0 and len(runs) % 2 == 0:
        runs, missing = np.append(runs, missing), 0  # some versions leave out the last run, of zeros
    if missing or (runs < 0).any() or (runs > rows * columns).any():
        raise DataError(f"{where}: its rle covers other than the {rows * columns} pixels of its box; export it again")
    mask = np.zeros((height, width), bool)
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask[top : top + rows, left : left + columns] = values.reshape(rows, columns)
    return mask


def _float(value: str | None, where: str) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: a coordinate is no number: {value!r:.40}; draw it again")
    return number


def _whole(element: ElementTree.Element, key: str, where: str, default: int | None = None) -> int:
    value = element.get(key)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise DataError(f"{where}: {key} must be a whole number, got {value!r:.40}") from None
