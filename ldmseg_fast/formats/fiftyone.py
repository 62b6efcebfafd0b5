"""Writes folders that FiftyOne imports: segments as detections with masks, and semantic masks.

The folder of a split is a COCODetectionDataset and an ImageSegmentationDirectory at once
(https://docs.voxel51.com/user_guide/import_datasets.html), so that no version of FiftyOne's own database is written.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.options import Summary, WriteOptions
from ldmseg_fast.formats.palette import category_values, save
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.shapes import segment_shapes

MOST = 65535  # values of two bytes beside 0, void


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/SPLIT/data, labels.json, labels/ and mask_targets.json for each split.

    labels.json has every segment as a COCO annotation with run lengths; FiftyOne makes a `Detection` with a mask of it.
    A pixel of labels/NAME.png has the value that mask_targets.json names, one or two bytes, 0 void.

    Raises:
        DataError: a map that cannot be read, or names that would replace each other.
    """
    walk = Walk(data_set, options)
    values = category_values(data_set.categories, MOST)
    dtype = np.uint8 if max(values.values()) <= 255 else np.uint16
    things = {category["id"]: category["isthing"] for category in data_set.categories}
    found: dict[str, dict[str, list[Any]]] = {split: {"images": [], "annotations": []} for split in data_set.splits}
    for item in walk.items("fiftyone"):
        folder, ids = out / item.split, item.map.ids
        item.put_picture(folder / "data" / item.name, options)
        images, annotations = found[item.split]["images"], found[item.split]["annotations"]
        height, width = ids.shape
        if item.stem != str(PurePosixPath(item.name).with_suffix("")):  # FiftyOne finds a mask by this name alone
            raise DataError(
                f"{item.name}: it has several maps, or another picture differs in its ending alone; FiftyOne has one "
                "map of a name: rename one of them, or leave it out"
            )
        image = {"id": len(images) + 1, "file_name": item.name, "height": height, "width": width}
        images.append(image)
        shapes = {shape["id"]: shape for shape in segment_shapes(ids, rle=True)}
        semantic = np.zeros(ids.shape, dtype)
        for segment in item.map.segments:
            shape = shapes[segment["id"]]
            semantic[ids == segment["id"]] = values[segment["category_id"]]
            annotations.append(
                {
                    **segment,
                    **shape,
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": values[segment["category_id"]],
                    "isthing": things[segment["category_id"]],
                    "segment_id": segment["id"],
                }
            )
        save(folder / "labels" / f"{item.stem}.png", semantic, None)
    categories = [
        {
            "id": values[category["id"]],
            "name": category["name"],
            "supercategory": category.get("supercategory", "thing" if category["isthing"] else "stuff"),
        }
        for category in data_set.categories
    ]
    for split, content in found.items():
        (out / split / "data").mkdir(parents=True, exist_ok=True)
        with replacing(out / split / "labels.json") as temporary:
            temporary.write_text(json.dumps({**content, "categories": categories}), encoding="utf-8")
        write_json(out / split / "mask_targets.json", {str(each["id"]): each["name"] for each in categories})
    return walk.summary(out)
