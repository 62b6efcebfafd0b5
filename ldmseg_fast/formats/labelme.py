"""Reads and writes LabelMe's JSONs (https://github.com/wkentaro/labelme, docs and labelme/utils/shape.py).

A JSON lies beside its picture. Points are x, y in pixels of the picture as it is shown, which is turned by its EXIF
orientation. Shapes are painted in their order, by Pillow as LabelMe paints them: what a polygon's line touches belongs
to it.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from ldmseg_fast.data.pictures import open_checked
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.drawn import (
    CATEGORIES,
    Shape,
    as_shown,
    as_stored,
    categories_of,
    check_size,
    known_categories,
    names_of,
    paint_in_order,
    score_of,
    shown_size,
)
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.formats.trees import Tree, plain_name
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.format import MAX_PIXELS
from ldmseg_fast.panoptic.outlines import Ring, fill, outlines, polygons_of
from ldmseg_fast.panoptic.shapes import segment_shapes

AREAS = {"polygon": (), "rectangle": (2, 4), "circle": (2,), "oriented_rectangle": (4,), "mask": (2,)}  # their points
NO_AREA = "shapes without an area, such as points and lines"
SHORT = "polygons of under 3 points"
VOID = ("_background_", "__ignore__")  # labels that stand for no category, by custom of LabelMe
SPLIT = "train"  # of JSONs that lie in no folder of a split
_FAR = 2**17  # pixels; no shape reaches further


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
        for shape in _shapes(content, tree.where(name)):
            labels.add(shape["label"])
            if (shape.get("flags") or {}).get("stuff") is True:
                stuff.add(shape["label"])
        path = content.get("imagePath")
        contents[name] = path if isinstance(path, str) and path else PurePosixPath(name).stem
        folder, _, rest = name.partition("/")
        found.setdefault(folder if rest else SPLIT, []).append(name)
    if not found:
        raise DataError(f"{source}: no JSON of LabelMe; each picture has one with `shapes` and `imagePath`")
    categories = categories_of(labels - set(VOID), options, stuff=stuff, known=known_categories(tree))
    splits: dict[str, Sequence[Entry]] = {
        split: [_entry(tree, name, contents[name], split, categories) for name in listed]
        for split, listed in found.items()
    }
    return DataSet(categories, splits, {"JSONs of other kinds": others} if others else {})


def _entry(tree: Tree, name: str, picture: str, split: str, categories: list[dict[str, Any]]) -> Entry:
    folder = PurePosixPath(name).parent.as_posix().removeprefix(".")
    found = tree.find(picture, [folder])
    content = tree.picture(found) if found else partial(_embedded, tree, name, picture)
    below = posixpath.join(folder.removeprefix(split).lstrip("/"), PurePosixPath(plain_name(picture)).name)
    read_map = partial(_read, tree, name, content, categories)
    return Entry(below, content, read_map, sources=tree.sources(name))


def _embedded(tree: Tree, name: str, picture: str) -> bytes:
    data = tree.json(name).get("imageData")
    if not isinstance(data, str) or not data:
        raise DataError(
            f"{tree.where(name)}: its picture {picture} is not there, nor in `imageData`; put it beside the JSON"
        )
    return _base64(data, f"{tree.where(name)}: imageData")


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: damaged base64 ({error}); save it again") from None


def _shapes(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise DataError(f"{where}: `shapes` must be a list, got {shapes!r:.80}")
    for place, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"]:
            raise DataError(f"{where}: shapes[{place}] has no label, got {shape!r:.80}; give it one")
        if not isinstance(shape.get("flags") or {}, dict):
            raise DataError(f"{where}: shapes[{place}]: flags must be an object, got {shape['flags']!r:.80}")
    return shapes


def _read(tree: Tree, name: str, picture: Path | Callable[[], bytes], categories: list[dict[str, Any]]) -> AnnotatedMap:
    where = tree.where(name)
    content = tree.json(name)
    height, width, turn = shown_size(picture, where)
    check_size((content.get("imageHeight"), content.get("imageWidth")), height, width, where)
    left_out: Counter[str] = Counter()
    shapes = _drawn(_shapes(content, where), height, width, where, left_out)
    painted = as_stored(paint_in_order(shapes, categories, height, width), turn)
    return AnnotatedMap(painted.ids, painted.segments, dict(Counter(painted.left_out) + left_out))


def _drawn(
    shapes: list[dict[str, Any]], height: int, width: int, where: str, left_out: Counter[str]
) -> Iterator[Shape]:
    for place, shape in enumerate(shapes):
        kind, here = shape.get("shape_type") or "polygon", f"{where}: shapes[{place}] ({shape['label']})"
        if kind not in AREAS:
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
            raise DataError(f"{where}: the point {point} is no number, or far outside of every picture; draw it again")
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
    with open_checked(f"{where}: mask", _base64(encoded, where), MAX_PIXELS) as image:
        try:
            patch: np.ndarray = np.array(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: its mask is damaged ({error}); draw it again") from None
    if patch.ndim == 3:
        patch = patch[..., :3].max(2)
    left, top = (math.floor(value + 0.5) for value in points[0])
    mask = np.zeros((height, width), bool)
    part = patch[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    mask[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]] = part > 0
    return mask


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
        for points in _polygons(rings.get(segment["id"], []), mask, left, top):
            yield {**shape, "shape_type": "polygon", "points": points, "mask": None}
        if mask.any():
            corners = [[left, top], [left + width - 1, top + height - 1]]
            yield {**shape, "shape_type": "mask", "points": corners, "mask": _png(mask)}


def _polygons(rings: list[Ring], mask: np.ndarray, left: int, top: int) -> Iterator[list[list[float]]]:
    """Gives the pieces that polygons hold, and takes them out of `mask`, bool [h, w]."""
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


def _png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
