"""Turns one result into what other libraries and tools hold. Those libraries are imported when they are asked for.

`names` are names of categories, by id. A category without one has its segments' `name`; without that it is "object"
where its id is 1, which is what class-agnostic models give, else "category N".
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.formats import geojson, label_studio, labelme
from ldmseg_fast.panoptic.results import COCO_KEYS, PanopticResult, instances_of
from ldmseg_fast.panoptic.shapes import segment_shapes

Names = Mapping[int, str] | None


def to_coco(result: PanopticResult, image_id: int | str, file_name: str) -> dict[str, Any]:
    """Returns an entry of `annotations` of a COCO panoptic JSON (cocodataset.org/#format-data).

    The map itself is written by `panoptic.format.write_panoptic_png`, under `file_name`.

    Raises:
        PanopticFormatError: see `check`; so do all of these.
    """
    check(result)
    segments = [{key: each[key] for key in COCO_KEYS if key in each} for each in result.segments_info]
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments}


def to_coco_instances(result: PanopticResult, image_id: int | str) -> list[dict[str, Any]]:
    """Returns COCO instance results with run lengths, which pycocotools' `COCO.loadRes` reads.

    Raises:
        PanopticFormatError: see `instances_of`.
    """
    check(result)
    return instances_of(image_id, result)


def to_transformers(result: PanopticResult, names: Names = None) -> list[dict[str, Any]]:
    """Returns what transformers' image-segmentation pipeline does: `score`, `label` and `mask` of each segment.

    A mask is Pillow's image of mode L with 255 inside. The source is
    https://huggingface.co/docs/transformers/main_classes/pipelines#transformers.ImageSegmentationPipeline.
    """
    check(result)
    return [
        {
            "score": segment.get("score"),
            "label": name_of(segment, names),
            "mask": Image.fromarray((result.segmentation == segment["id"]).astype(np.uint8) * np.uint8(255)),
        }
        for segment in result.segments_info
    ]


def to_supervision(result: PanopticResult, names: Names = None) -> Any:
    """Returns `supervision.Detections` (https://supervision.roboflow.com/latest/detection/core) of all segments.

    `mask` is bool [N, H, W] and `xyxy` float32 [N, 4], whose last corner is the last pixel, as supervision's own
    `mask_to_xyxy` has it. `class_id` is the category, `confidence` the score. `data` has `class_name`, `segment_id` and
    `isthing`.

    Raises:
        ArgumentError: supervision is not installed.
    """
    supervision = _library("supervision", "to_supervision")
    check(result)
    segments = result.segments_info
    boxes = {shape["id"]: shape["bbox"] for shape in segment_shapes(result.segmentation)}
    corners = [(x, y, x + w - 1, y + h - 1) for x, y, w, h in (boxes[segment["id"]] for segment in segments)]
    ids = np.array([segment["id"] for segment in segments], np.int64)
    return supervision.Detections(
        xyxy=np.array(corners, np.float32).reshape(-1, 4),
        mask=result.segmentation[None] == ids[:, None, None],
        confidence=np.array([segment.get("score", 1.0) for segment in segments], np.float32),
        class_id=np.array([segment["category_id"] for segment in segments], np.int64),
        data={
            "class_name": np.array([name_of(segment, names) for segment in segments], str),
            "segment_id": ids,
            "isthing": np.array([bool(segment.get("isthing", True)) for segment in segments], bool),
        },
    )


def to_fiftyone(result: PanopticResult, names: Names = None) -> Any:
    """Returns `fiftyone.Detections` with a mask of each segment (https://docs.voxel51.com/user_guide/using_datasets.html).

    A detection's mask is bool [h, w] in its `bounding_box`, which is x, y, width and height as parts of the picture's
    size. Attributes are `segment_id`, `isthing` and `iscrowd`.

    Raises:
        ArgumentError: fiftyone is not installed.
    """
    fiftyone = _library("fiftyone", "to_fiftyone")
    check(result)
    height, width = result.segmentation.shape
    boxes = {shape["id"]: shape["bbox"] for shape in segment_shapes(result.segmentation)}
    detections = []
    for segment in result.segments_info:
        x, y, w, h = boxes[segment["id"]]
        detections.append(
            fiftyone.Detection(
                label=name_of(segment, names),
                bounding_box=[x / width, y / height, w / width, h / height],
                mask=result.segmentation[y : y + h, x : x + w] == segment["id"],
                confidence=segment.get("score"),
                segment_id=segment["id"],
                isthing=bool(segment.get("isthing", True)),
                iscrowd=bool(segment.get("iscrowd", False)),
            )
        )
    return fiftyone.Detections(detections=detections)


def to_labelme(result: PanopticResult, picture: str, names: Names = None, shape: str = "rle") -> dict[str, Any]:
    """Returns what LabelMe's JSON of a picture holds, see `labelme.content_of`.

    Args:
        result: of the picture as LabelMe shows it.
        picture: its file, relative to the JSON.
        names: of categories.
        shape: "rle" for masks, "polygon".
    """
    check(result, shape)
    categories = {each["id"]: each for each in categories_of(result, names)}
    return labelme.content_of(result.segmentation, result.segments_info, categories, picture, shape)


def to_label_studio(result: PanopticResult, url: str, names: Names = None, shape: str = "rle") -> dict[str, Any]:
    """Returns a task of Label Studio with a prediction, which it shows as a pre-annotation.

    Args:
        result: of the picture as Label Studio shows it.
        url: where it finds the picture.
        names: of categories.
        shape: "rle" for brushes, "polygon".
    """
    check(result, shape)
    known = {each["id"]: each["name"] for each in categories_of(result, names)}
    return label_studio.task_of(result.segmentation, result.segments_info, known, url, shape)


def to_geojson(result: PanopticResult, picture: str = "", names: Names = None) -> dict[str, Any]:
    """Returns a FeatureCollection in pixels, see `geojson.feature_collection`."""
    check(result)
    return geojson.feature_collection(result.segmentation, result.segments_info, categories_of(result, names), picture)


def check(result: PanopticResult, shape: str = "rle") -> None:
    """Checks that a result's list has the segments of its map, each once.

    Raises:
        PanopticFormatError: ids that the map or the list alone has.
        ArgumentError: a shape that is neither "rle" nor "polygon".
    """
    if shape not in ("rle", "polygon"):
        raise ArgumentError(f"shape={shape!r}: 'rle' or 'polygon' expected")
    listed = sorted(segment["id"] for segment in result.segments_info)
    present = [shape["id"] for shape in segment_shapes(result.segmentation)]
    if listed != present:
        wrong = sorted(set(listed) ^ set(present)) or listed
        raise PanopticFormatError(f"ids that are not once in the map and once in segments_info: {wrong[:20]}")


def categories_of(result: PanopticResult, names: Names = None) -> list[dict[str, Any]]:
    """Lists the categories of a result's segments as COCO's entries."""
    found = {
        each["category_id"]: {
            "id": each["category_id"],
            "name": name_of(each, names),
            "isthing": int(bool(each.get("isthing", True))),
        }
        for each in result.segments_info
    }
    return [found[number] for number in sorted(found)]


def name_of(segment: Mapping[str, Any], names: Names = None) -> str:
    """Returns the name of a segment's category."""
    number = segment["category_id"]
    default = segment.get("name") or ("object" if number == 1 else f"category {number}")
    return default if names is None else names.get(number, default)


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ArgumentError(f"{what} needs {name} ({error}); pip install 'ldmseg_fast[{name}]'") from None
