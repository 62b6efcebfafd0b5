"""Reads and writes COCO's instances and stuff (cocodataset.org/#format-data), as CVAT and others export them too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing
from ldmseg_fast.formats.coco_files import CocoFile, data_set_of, is_coco
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.formats.trees import Tree
from ldmseg_fast.formats.walk import Item, Walk
from ldmseg_fast.panoptic.outlines import Ring, outlines, polygons_of, without_holes
from ldmseg_fast.panoptic.shapes import segment_shapes

_KINDS = {"instances": False, "stuff": True}  # what a name begins with, and whether the categories are stuff
_OTHERS = ("captions_", "image_info_", "panoptic_", "person_keypoints_")  # COCO's other annotations


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads SRC/annotations/instances_SPLIT.json and stuff_SPLIT.json, with pictures in SRC/SPLIT or SRC/images.

    Other JSONs that hold COCO's lists are splits of their own where none has such a name. Stuff is painted first, then
    crowds, then things from the largest to the smallest.

    Args:
        source: the folder, a `.zip` of it, or one JSON.
        options: `version` has no meaning.

    Raises:
        DataError: no such JSON; see `data_set_of`.
    """
    options.one_version((), "coco-instances")
    tree = Tree(source)
    if tree.only and source.parent.name == "annotations":  # pictures lie beside that folder
        tree = Tree(source.parent.parent)
        tree.only = f"annotations/{source.name}"
    names = [tree.only] if tree.only else tree.below(suffixes=[".json"])
    named = [name for name in names if PurePosixPath(name).stem.split("_")[0] in _KINDS]
    if not named and not tree.only:
        named = [
            name for name in names if not PurePosixPath(name).name.startswith(_OTHERS) and is_coco(tree.json(name))
        ]
    if not named and not tree.only:
        raise DataError(f"{source}: no JSON of COCO's instances; expected annotations/instances_SPLIT.json")
    data_set = data_set_of(tree, [_file(name) for name in named or names], options)
    skipped = len(names) - len(named or names)
    others = {"JSONs of other kinds": skipped} if skipped else {}
    return DataSet(data_set.categories, data_set.splits, {**data_set.left_out, **others})


def _file(name: str) -> CocoFile:
    path = PurePosixPath(name)
    kind, _, split = path.stem.partition("_")
    if kind not in _KINDS or not split:
        kind, split = "instances", path.stem
    beside = path.parent.as_posix().removeprefix(".")
    root = path.parent.parent.as_posix() if path.parent.name == "annotations" else beside
    root = "" if root == "." else f"{root}/" if root else ""
    folders = (f"{root}{split}", f"{root}images/{split}", f"{root}images", root.rstrip("/"), beside)
    return CocoFile(name, split, tuple(dict.fromkeys(folders)), _KINDS[kind])


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/annotations/instances_SPLIT.json, stuff_SPLIT.json for stuff, and pictures in OUT/images/SPLIT.

    Masks are compressed run lengths, or with `shape` "polygon" outlines along pixel edges; crowds are always run
    lengths. COCO's polygons have no holes: each is opened by a slit of no width, and pycocotools fills the same pixels.

    Raises:
        DataError: a map that cannot be read, or names that would replace each other.
    """
    walk = Walk(data_set, options)
    (out / "annotations").mkdir(parents=True)
    files: dict[str, dict[str, list[Any]]] = {}
    for split in data_set.splits:
        for kind, isthing in (("instances", 1), ("stuff", 0)):
            categories = [each for each in data_set.categories if each["isthing"] == isthing]
            if categories or isthing:
                files[f"{kind}_{split}"] = {"images": [], "annotations": [], "categories": categories}
    kinds = {each["id"]: "instances" if each["isthing"] else "stuff" for each in data_set.categories}
    number = 0
    for item in walk.items("coco-instances"):
        item.put_picture(out / "images" / item.split / item.name, options)
        height, width = item.map.ids.shape
        image = {"id": item.place.image_id, "file_name": item.name, "height": height, "width": width}
        for kind in _KINDS:
            if f"{kind}_{item.split}" in files:
                files[f"{kind}_{item.split}"]["images"].append(image)
        for segment, shape in _annotations(item, options):
            number += 1
            kind = kinds[segment["category_id"]]
            score = {"score": segment["score"]} if "score" in segment else {}
            annotation = {"id": number, "image_id": item.place.image_id, "category_id": segment["category_id"]}
            files[f"{kind}_{item.split}"]["annotations"].append(
                {**annotation, "iscrowd": int(segment.get("iscrowd", 0)), **shape, **score}
            )
    for name, content in files.items():
        with replacing(out / "annotations" / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return walk.summary(out)


def _annotations(item: Item, options: WriteOptions) -> Iterable[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Gives each segment with its area, box and mask."""
    shapes = {shape["id"]: shape for shape in segment_shapes(item.map.ids, rle=True)}
    rings = outlines(item.map.ids) if options.shape == "polygon" else {}
    for segment in item.map.segments:
        shape = dict(shapes[segment["id"]])
        del shape["id"]
        if options.shape == "polygon" and not segment.get("iscrowd"):
            shape["segmentation"] = flat_polygons(rings[segment["id"]])
        yield segment, shape


def flat_polygons(rings: Iterable[Ring]) -> list[list[int]]:
    """Lists the outlines of one segment as COCO writes polygons, [[x0, y0, x1, y1, ...], ...], without holes."""
    return [without_holes(polygon).ravel().tolist() for polygon in polygons_of(rings)]
