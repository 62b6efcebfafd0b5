"""Writes results in the two forms that Cityscapes' evaluation reads.

cityscapesscripts' evalPanopticSemanticLabeling reads a JSON and PNGs in COCO-panoptic form, whose image ids are
CITY_SEQUENCE_FRAME. evalInstanceLevelSemanticLabeling reads a text file a picture, with a line an instance: path of its
mask, label id, confidence (https://github.com/mcordts/cityscapesScripts).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing
from ldmseg_fast.formats.cityscapes_labels import CITYSCAPES, Label
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.options import Summary, WriteOptions
from ldmseg_fast.formats.palette import save
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.shapes import segment_shapes

EVALUATED = {label.name: label for label in CITYSCAPES if label.train_id is not None}

_PICTURE = "_leftImg8bit"  # what the names of Cityscapes' pictures end in


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/cityscapes_panoptic_SPLIT.json with its PNGs, and OUT/instances/SPLIT/*.txt with their masks.

    Categories are found by Cityscapes' names, such as "traffic light". Segments of other categories become void.

    Raises:
        DataError: no category of Cityscapes, two pictures of one name in different folders, a map that cannot be read.
    """
    labels = cityscapes_labels(data_set.categories)
    walk = Walk(data_set, options)
    annotations: dict[str, list[dict[str, Any]]] = {split: [] for split in data_set.splits}
    images: dict[tuple[str, str], str] = {}
    for item in walk.items("cityscapes-results"):
        image_id = PurePosixPath(item.name).stem.removesuffix(_PICTURE)
        if (other := images.get((item.split, image_id))) is not None:
            raise DataError(
                f"{item.name} and {other}: Cityscapes knows both as {image_id} and has one map of it; rename one, or "
                "leave one out"
            )
        images[item.split, image_id] = item.name
        kept = [segment for segment in item.map.segments if segment["category_id"] in labels]
        others = len(item.map.segments) - len(kept)
        walk.leave_out("segments of categories that Cityscapes does not evaluate", others, item.name)
        walk.segments -= others
        ids = np.where(np.isin(item.map.ids, [segment["id"] for segment in kept]), item.map.ids, 0)
        shapes = {shape["id"]: shape for shape in segment_shapes(ids)}
        segments = [
            {**segment, "category_id": labels[segment["category_id"]].id, **shapes[segment["id"]]} for segment in kept
        ]
        name = f"{image_id}_panoptic.png"
        folder = out / f"cityscapes_panoptic_{item.split}"
        folder.mkdir(exist_ok=True)
        write_panoptic_png(folder / name, ids)
        annotations[item.split].append({"image_id": image_id, "file_name": name, "segments_info": segments})
        _write_instances(out / "instances" / item.split, image_id, ids, segments)
        crowds = sum(bool(each.get("iscrowd")) for each in segments)
        walk.leave_out("crowds, which the text files do not have; the PNGs do", crowds, item.name)
    categories = [label.category() for label in EVALUATED.values()]
    for split, listed in annotations.items():
        content = {"annotations": listed, "categories": categories}
        with replacing(out / f"cityscapes_panoptic_{split}.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return walk.summary(out)


def cityscapes_labels(categories: Iterable[Mapping[str, Any]]) -> dict[int, Label]:
    """Finds the label of Cityscapes for each category id that has one, by the category's name.

    Raises:
        DataError: none has.
    """
    named = {category["id"]: category["name"].casefold().replace("_", " ") for category in categories}
    labels = {number: EVALUATED[name] for number, name in named.items() if name in EVALUATED}
    if not labels:
        raise DataError(
            f"none of the categories ({', '.join(list(named.values())[:5])}) is one of Cityscapes'; it has "
            f"{', '.join(EVALUATED)}: name them alike"
        )
    return labels


def _write_instances(folder: Path, image_id: str, ids: np.ndarray, segments: Iterable[Mapping[str, Any]]) -> None:
    """Writes the masks of things, and the text file that names them."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    things = {label.id for label in EVALUATED.values() if label.isthing}
    lines = []
    for segment in segments:
        if segment.get("iscrowd") or segment["category_id"] not in things:
            continue
        mask = f"masks/{quote(image_id, safe='')}_{segment['id']}.png"  # spaces would part the fields of a line
        save(folder / mask, np.where(ids == segment["id"], 255, 0).astype(np.uint8), None)
        lines.append(f"{mask} {segment['category_id']} {float(segment.get('score', 1.0)):.6g}\n")
    with replacing(folder / f"{image_id}.txt") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
