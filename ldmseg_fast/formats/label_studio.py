"""Reads Label Studio's JSON export, and writes tasks with predictions or annotations
(https://labelstud.io/guide/task_format, https://labelstud.io/guide/predictions).

Coordinates are percent of the picture as it is shown, which is turned by its EXIF orientation. Regions are painted in
their order.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats import brush
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
    voc_colours,
)
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.formats.trees import Tree, plain_name
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons
from ldmseg_fast.panoptic.outlines import Ring, outlines, polygons_of, without_holes

NO_AREA = "regions without an area, such as key points"
NO_LABEL = "regions without a label"
SHORT = "polygons of under 3 points"
EARLIER = "annotations of a picture beside its last one"
UNDONE = "tasks without an annotation"
CROWD = "marks of crowds; their pixels are there"
SPLIT = "train"  # of a JSON that has no name of a split
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # what Label Studio calls an uploaded file
_EXPORTED = re.compile(r"project-\d+-at-.*|result|export|tasks")  # what Label Studio calls an export


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads the JSONs of SRC, each a split by its name; Label Studio's own names mean `train`.

    Labels are categories, numbered in alphabetical order. All are things but those that `options.things` leaves out. Of
    several annotations of a picture the last that was not cancelled is read.

    Args:
        source: one JSON, or a folder or `.zip` that has JSONs and pictures. A picture is found by its path, or by its
            name with or without what Label Studio puts before an uploaded one.
        options: `version` "predictions" reads these in the place of annotations.

    Raises:
        DataError: no JSON of tasks.
    """
    key = options.one_version(("annotations", "predictions"), "label-studio", "annotations")
    tree = Tree(source)
    names = [tree.only] if tree.only else [name for name in tree.below(suffixes=[".json"]) if name != CATEGORIES]
    tasks: dict[str, list[tuple[str, dict[str, Any], list[dict[str, Any]]]]] = {}
    labels: set[str] = set()
    left_out: Counter[str] = Counter()
    for name in names:
        content = tree.json(name)
        content = [content] if isinstance(content, dict) and "data" in content else content
        if not isinstance(content, list) or not all(isinstance(task, dict) and "data" in task for task in content):
            if tree.only:
                raise DataError(f"{tree.where(name)}: no tasks; export the project as JSON, not JSON-MIN")
            left_out["JSONs of other kinds"] += 1
            continue
        stem = PurePosixPath(name).stem
        split = SPLIT if _EXPORTED.fullmatch(stem) else stem
        for place, task in enumerate(content):
            regions = _regions(task, key, f"{tree.where(name)}: task {task.get('id', place)!r}", left_out)
            if regions is None:
                left_out[UNDONE] += 1
                continue
            tasks.setdefault(split, []).append((name, task, regions))
            labels.update(filter(None, map(partial(_label, _named(regions)), regions)))
    if not tasks:
        undone = f"; {left_out[UNDONE]} tasks have no {key}" if left_out[UNDONE] else ""
        raise DataError(f"{source}: no annotated task of Label Studio{undone}; export the project as JSON")
    categories = categories_of(labels, options, known=known_categories(tree))
    splits: dict[str, Sequence[Entry]] = {
        split: [_entry(tree, *task, categories) for task in listed] for split, listed in tasks.items()
    }
    return DataSet(categories, splits, dict(+left_out))


def _regions(task: dict[str, Any], key: str, where: str, left_out: Counter[str]) -> list[dict[str, Any]] | None:
    """Returns the regions of a task's last annotation; None where it has none."""
    listed = task.get(key) or []
    if key == "annotations" and not listed:
        listed = task.get("completions") or []  # before version 1.0
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise DataError(f"{where}: {key} must be a list of objects, got {listed!r:.80}")
    done = [each for each in listed if not each.get("was_cancelled")]
    if not done:
        return None
    left_out[EARLIER] += len(done) - 1
    truths = [each for each in done if each.get("ground_truth") is True]
    regions = (truths or done)[-1].get("result")
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise DataError(f"{where}: result must be a list of regions, got {regions!r:.80}")
    for region in regions:
        if not isinstance(region.get("value", {}), dict):
            raise DataError(f"{where}: a region's value must be an object, got {region['value']!r:.80}")
    return regions


def _named(regions: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """Finds labels that stand in a result of their own, by the region's id."""
    found: dict[Any, str] = {}
    for region in regions:
        value = region.get("value", {})
        for key in ("labels", "choices", *(key for key in value if key.endswith("labels"))):
            if isinstance(value.get(key), list) and value[key] and isinstance(value[key][0], str):
                found.setdefault(str(region.get("id")), value[key][0])
    return found


def _label(named: Mapping[Any, str], region: Mapping[str, Any]) -> str | None:
    """Returns the label of a region that has an area."""
    if _kind(region) is None:
        return None
    value = region.get("value", {})
    for key, listed in value.items():
        if key.endswith("labels") and isinstance(listed, list) and listed and isinstance(listed[0], str):
            return listed[0]
    return named.get(str(region.get("id")))


def _kind(region: Mapping[str, Any]) -> str | None:
    value = region.get("value", {})
    if "rle" in value:
        return "brush"
    if "radiusX" in value:
        return "ellipse"
    if "points" in value and str(region.get("type", "polygon")).startswith("polygon"):
        return "polygon"
    return "rectangle" if {"x", "y", "width", "height"} <= value.keys() and "text" not in value else None


def _entry(
    tree: Tree, name: str, task: dict[str, Any], regions: list[dict[str, Any]], categories: list[dict[str, Any]]
) -> Entry:
    where = f"{tree.where(name)}: task {task.get('id')!r}"
    address = _address(task["data"], where)
    if address.startswith("data:"):
        picture: Any = partial(_inline, address, where)
        below = f"task-{task.get('id')}.{address[11:].partition(';')[0]}"
    else:
        folder = PurePosixPath(name).parent.as_posix().removeprefix(".")
        below, found = _find(tree, address, folder)
        picture = tree.picture(found or below)
    return Entry(below, picture, partial(_read, regions, picture, categories, where), sources=tree.sources(name))


def _address(data: Any, where: str) -> str:
    values = data if isinstance(data, dict) else {}
    for key in ("image", "img", "ocr", *values):
        value = values.get(key)
        if isinstance(value, str) and (value.startswith("data:image/") or PurePosixPath(_path(value)).suffix):
            return value
    raise DataError(f"{where}: no picture in its data, got {data!r:.80}")


def _path(address: str) -> str:
    """Returns the path in an address, such as /data/local-files/?d=folder/a.jpg, s3://bucket/a.jpg or C:\\a.jpg."""
    if re.match(r"[A-Za-z]:[\\/]", address):
        return address.replace("\\", "/")[2:]
    parts = urlsplit(address)
    inner = parse_qs(parts.query).get("d", [""])[0]
    return (inner or unquote(parts.path)).replace("\\", "/")


def _find(tree: Tree, address: str, folder: str) -> tuple[str, str | None]:
    """Returns what a picture is called, and the file that it is."""
    path = PurePosixPath(_path(address).lstrip("/"))
    uploaded = _UPLOADED.fullmatch(path.name)
    names = [path.name, *([uploaded[1]] if uploaded else [])]
    for first in range(len(path.parts)):  # with as many folders as lead to a file
        tail = "/".join(path.parts[first:])
        for place in dict.fromkeys((folder, "", "images")):
            full = f"{place}/{tail}" if place else tail
            if full in tree:
                return _below(full), full
    for name in names:
        if (found := tree.find(name, [folder, "", "images"])) is not None:
            return _below(found), found
    return plain_name(names[-1]), None


def _below(name: str) -> str:
    """Returns a picture's name without the folder of its split."""
    _, _, rest = name.partition("/")
    return rest or name


def _inline(address: str, where: str) -> bytes:
    try:
        return base64.b64decode(address.partition(",")[2])
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: its picture is damaged base64 ({error}); export it again") from None


def _read(
    regions: list[dict[str, Any]],
    picture: Path | Callable[[], bytes],
    categories: list[dict[str, Any]],
    where: str,
) -> AnnotatedMap:
    height, width, turn = shown_size(picture, where)
    left_out: Counter[str] = Counter()
    shapes = _drawn(regions, height, width, where, left_out)
    painted = as_stored(paint_in_order(shapes, categories, height, width), turn)
    return AnnotatedMap(painted.ids, painted.segments, dict(Counter(painted.left_out) + left_out))


def _drawn(
    regions: list[dict[str, Any]], height: int, width: int, where: str, left_out: Counter[str]
) -> Iterator[Shape]:
    named = _named(regions)
    for region in regions:
        kind, value = _kind(region), region.get("value", {})
        here = f"{where}, region {region.get('id')!r:.40}"
        if kind is None:
            left_out[NO_AREA] += region.get("type") not in ("labels", "choices", "textarea", "rating", "relation")
            continue
        label = _label(named, region)
        if label is None:
            left_out[NO_LABEL] += 1
            continue
        check_size((region.get("original_height"), region.get("original_width")), height, width, here)
        if region.get("image_rotation"):
            raise DataError(
                f"{here}: drawn on a picture turned by {region['image_rotation']!r:.40}; turn it back there"
            )
        if kind == "brush":
            pixels = brush.decode(value["rle"], height, width, here)
        else:
            points = _points(kind, value, here) * [width / 100, height / 100]
            if len(points) < 3:
                left_out[SHORT] += 1
                continue
            pixels = mask_of_polygons([points], height, width, here)
        yield Shape(pixels, label, score=score_of(region), name=here)


def _points(kind: str, value: Mapping[str, Any], where: str) -> np.ndarray:
    """Lists the corners of a region in percent, float [N, 2]."""
    if kind == "polygon":
        points = value["points"]
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise DataError(f"{where}: points must be a list of [x, y], got {points!r:.80}")
        flat = [number for point in points for number in point]
    else:
        keys = ("x", "y", "width", "height") if kind == "rectangle" else ("x", "y", "radiusX", "radiusY")
        flat = [value.get(key) for key in (*keys, "rotation") if key in value]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in flat):
        raise DataError(f"{where}: a coordinate is no number, in {value!r:.120}; draw it again")
    if kind == "polygon":
        return np.array(flat, float).reshape(-1, 2)
    x, y, first, second, *turn = flat
    if any(turn):
        raise DataError(f"{where}: a {kind} turned by {turn[0]} degrees; draw it as a polygon or with the brush")
    if kind == "rectangle":
        return np.array([[x, y], [x + first, y], [x + first, y + second], [x, y + second]], float)
    angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    return np.stack([x + first * np.cos(angle), y + second * np.sin(angle)], axis=1)


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/SPLIT.json with the tasks, pictures in OUT/SPLIT, labels.xml and categories.json.

    Segments with a score are predictions, which Label Studio shows as pre-annotations, others are annotations. They are
    brushes, or with `shape` "polygon" one polygon a piece, whose holes are opened by slits of no width. Tasks name
    pictures as Label Studio's local files do, with OUT as the root of these. labels.xml is the project's labelling
    interface, categories.json says which are things.

    Raises:
        DataError: a map that cannot be read, or names that would replace each other.
    """
    walk = Walk(data_set, options)
    write_json(out / CATEGORIES, data_set.categories)
    with replacing(out / "labels.xml") as temporary:
        temporary.write_text(_interface(data_set.categories, options), encoding="utf-8")
    names = names_of(data_set.categories)
    tasks: dict[str, list[str]] = {split: [] for split in data_set.splits}
    scored = False
    for item in walk.items("label-studio"):
        item.put_picture(out / item.split / item.name, options)
        ids = as_shown(item.map.ids, shown_size(item.place.entry.picture, item.name)[2])
        url = f"/data/local-files/?d={quote(f'{item.split}/{item.name}')}"
        task = task_of(ids, item.map.segments, names, url, options.shape)
        scored |= "predictions" in task
        tasks[item.split].append(json.dumps(task))
        crowds = sum(bool(segment.get("iscrowd")) for segment in item.map.segments)
        walk.leave_out(CROWD, crowds, item.name)
        if options.shape == "polygon":
            split_up = sum(len(polygons_of(rings)) > 1 for rings in outlines(item.map.ids).values())
            walk.leave_out("segments of several pieces, each of which is a region of its own", split_up, item.name)
    for split, listed in tasks.items():
        with replacing(out / f"{split}.json") as temporary:
            text = "[\n" + ",\n".join(listed) + "\n]\n"
            if scored:  # of pictures without a segment nothing tells that they are predictions
                text = text.replace('"annotations": [{"result": []}]', '"predictions": []')
            temporary.write_text(text, encoding="utf-8")
    return walk.summary(out)


def _interface(categories: Sequence[Mapping[str, Any]], options: WriteOptions) -> str:
    tag = "BrushLabels" if options.shape == "rle" else "PolygonLabels"
    colours = voc_colours(len(categories) + 1)
    rows = [
        f'    <Label value={quoteattr(category["name"])} background="#{bytes(colour).hex()}"/>\n'
        for category, colour in zip(categories, colours[1:])
    ]
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <{tag} name="label" toName="image">\n{"".join(rows)}  </{tag}>\n</View>\n'
    )


def task_of(
    ids: np.ndarray, segments: Iterable[Mapping[str, Any]], names: Mapping[int, str], url: str, shape: str = "rle"
) -> dict[str, Any]:
    """Describes a map as a task of Label Studio: predictions where segments have scores, else annotations.

    Args:
        ids: integer [H, W], 0 void, of the picture as it is shown.
        segments: its segments, with `id` and `category_id`.
        names: of the categories, by id.
        url: where Label Studio finds the picture.
        shape: "rle" for brushes, "polygon" for polygons.
    """
    rings = outlines(ids) if shape == "polygon" else {}
    results: list[dict[str, Any]] = []
    scores: list[float] = []
    for segment in segments:
        score = {"score": segment["score"]} if "score" in segment else {}
        scores += score.values()
        for number, value in enumerate(_values(ids, segment["id"], rings)):
            kind = f"{'polygon' if 'points' in value else 'brush'}labels"
            results.append(
                {
                    "id": f"{segment['id']}-{number}",
                    "type": kind,
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": ids.shape[1],
                    "original_height": ids.shape[0],
                    "image_rotation": 0,
                    "value": {**value, kind: [names[segment["category_id"]]]},
                    **score,
                }
            )
    data = {"image": url}
    if scores:
        prediction = {"model_version": "ldmseg", "score": sum(scores) / len(scores), "result": results}
        return {"data": data, "predictions": [prediction]}
    return {"data": data, "annotations": [{"result": results}]}


def _values(ids: np.ndarray, segment: int, rings: Mapping[int, list[Ring]]) -> Iterator[dict[str, Any]]:
    if not rings:
        yield {"format": "rle", "rle": brush.encode(ids == segment)}
        return
    for polygon in polygons_of(rings[segment]):
        points = without_holes(polygon) * (100 / np.array(ids.shape[::-1]))
        yield {"points": points.tolist(), "closed": True}
