"""Reads Label Studio's JSON export, and writes tasks with predictions or annotations
(https://labelstud.io/guide/task_format, https://labelstud.io/guide/predictions).

Coordinates are percent of the picture as it is shown, which is turned by its EXIF orientation. Regions are painted in
their order.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats import brush
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.drawn import (
    CATEGORIES,
    as_shown,
    as_stored,
    categories_of,
    known_categories,
    names_of,
    paint_in_order,
    shown_size,
    voc_colours,
)
from ldmseg_fast.formats.label_studio_tasks import (
    address_of,
    find_picture,
    inline_picture,
    label_of,
    labels_beside,
    regions_of,
    shapes_of,
)
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.formats.trees import Tree, check_one_name
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.outlines import Ring, outlines, polygons_of, without_holes

UNDONE = "tasks without an annotation"
CROWD = "marks of crowds; their pixels are there"
SPLIT = "train"  # of a JSON that has no name of a split
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
            regions = regions_of(task, key, f"{tree.where(name)}: task {task.get('id', place)!r}", left_out)
            if regions is None:
                left_out[UNDONE] += 1
                continue
            tasks.setdefault(split, []).append((name, task, regions))
            labels.update(filter(None, map(partial(label_of, labels_beside(regions)), regions)))
    if not tasks:
        undone = f"; {left_out[UNDONE]} tasks have no {key}" if left_out[UNDONE] else ""
        raise DataError(f"{source}: no annotated task of Label Studio{undone}; export the project as JSON")
    categories = categories_of(labels, options, known=known_categories(tree))
    splits: dict[str, Sequence[Entry]] = {}
    for split, listed in tasks.items():
        met: dict[str, str] = {}
        splits[split] = [_entry(tree, *task, categories, met) for task in listed]
    return DataSet(categories, splits, dict(+left_out))


def _entry(
    tree: Tree,
    name: str,
    task: dict[str, Any],
    regions: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    met: dict[str, str],
) -> Entry:
    where = f"{tree.where(name)}: task {task.get('id')!r}"
    address = address_of(task["data"], where)
    if address.startswith("data:"):
        picture: Any = partial(inline_picture, address, where)
        below = f"task-{task.get('id')}.{address[11:].partition(';')[0]}"
    else:
        folder = PurePosixPath(name).parent.as_posix().removeprefix(".")
        below, found = find_picture(tree, address, folder)
        picture = tree.picture(found or below)
        if found is not None:
            check_one_name(met, found, address, where)
    return Entry(below, picture, partial(_read, regions, picture, categories, where), sources=tree.sources(name))


def _read(
    regions: list[dict[str, Any]],
    picture: Path | Callable[[], bytes],
    categories: list[dict[str, Any]],
    where: str,
) -> AnnotatedMap:
    height, width, turn = shown_size(picture, where)
    left_out: Counter[str] = Counter()
    shapes = shapes_of(regions, height, width, where, left_out)
    painted = as_stored(paint_in_order(shapes, categories, height, width), turn)
    return AnnotatedMap(painted.ids, painted.segments, dict(Counter(painted.left_out) + left_out))


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
