"""Reads the parts of Label Studio's tasks: annotations, regions, labels, and addresses of pictures
(https://labelstud.io/guide/task_format).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from ldmseg_fast.data.picture_folders import picture_suffixes
from ldmseg_fast.data.pictures import open_checked
from ldmseg_fast.data.pixel_formats import pillow_errors
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats import brush
from ldmseg_fast.formats.drawn import Shape, check_size, is_number, score_of
from ldmseg_fast.formats.labelme_shapes import from_base64
from ldmseg_fast.formats.trees import Tree, plain_name
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons
from ldmseg_fast.panoptic.format import MAX_PIXELS

NO_AREA = "regions without an area, such as key points"
NO_LABEL = "regions without a label"
MORE_LABELS = "labels of a region beside its first one"
SHORT = "polygons of under 3 points"
EARLIER = "annotations of a picture beside its last one"
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # what Label Studio calls an uploaded file


def regions_of(task: dict[str, Any], key: str, where: str, left_out: Counter[str]) -> list[dict[str, Any]] | None:
    """Returns the regions of a task's last annotation that was not cancelled; None where it has none.

    Args:
        task: one of the export.
        key: "annotations" or "predictions".
        where: for the error.
        left_out: counts the others.

    Raises:
        DataError: no such lists.
    """
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


def labels_beside(regions: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """Finds labels that stand in a result of their own: id of a region -> label, or the choice where it has none."""
    found: dict[Any, str] = {}
    identified = [region for region in regions if region.get("id") is not None]
    for region in identified:
        for label in _own_labels(region)[:1]:
            found.setdefault(str(region["id"]), label)
    for region in identified:
        choices = region.get("value", {}).get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], str):
            found.setdefault(str(region["id"]), choices[0])
    return found


def label_of(named: Mapping[Any, str], region: Mapping[str, Any]) -> str | None:
    """Returns the label of a region that has an area, None where it has none; `named` is from `labels_beside`."""
    if _kind(region) is None:
        return None
    own = _own_labels(region)
    return own[0] or None if own else named.get(str(region.get("id"))) or None


def _own_labels(region: Mapping[str, Any]) -> list[str]:
    for key, listed in region.get("value", {}).items():
        if key.endswith("labels") and isinstance(listed, list) and listed and isinstance(listed[0], str):
            return listed
    return []


def _kind(region: Mapping[str, Any]) -> str | None:
    value = region.get("value", {})
    if "rle" in value:
        return "brush"
    if "imageDataURL" in value:
        return "bitmask"
    if "radiusX" in value:
        return "ellipse"
    if "points" in value and str(region.get("type", "polygon")).startswith("polygon"):
        return "polygon"
    return "rectangle" if {"x", "y", "width", "height"} <= value.keys() and "text" not in value else None


def address_of(data: Any, where: str) -> str:
    """Returns where a task says that its picture is.

    Raises:
        DataError: nowhere.
    """
    values = data if isinstance(data, dict) else {}
    texts = [value for key in ("image", "img", "ocr", *values) if isinstance(value := values.get(key), str)]
    for text in texts:
        if text.startswith("data:image/") or PurePosixPath(_path(text)).suffix.lower() in picture_suffixes():
            return text
    raise DataError(f"{where}: no picture in its data, got {data!r:.80}")


def _path(address: str) -> str:
    """Returns the path in an address, such as /data/local-files/?d=folder/a.jpg, s3://bucket/a.jpg or C:\\a.jpg."""
    if re.match(r"[A-Za-z]:[\\/]", address):
        return address.replace("\\", "/")[2:]
    try:
        parts = urlsplit(address, allow_fragments=False)  # names of files have a # now and then
    except ValueError:  # no address
        return ""
    inner = parse_qs(parts.query).get("d", [""])[0]
    return (inner or unquote(parts.path)).replace("\\", "/")


def find_picture(tree: Tree, address: str, folder: str) -> tuple[str, str | None]:
    """Returns what a picture is called below its split, and the file of the tree that it is, None where there is none.

    Args:
        tree: of the source.
        address: from `address_of`.
        folder: of the JSON.
    """
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


def inline_picture(address: str, where: str) -> bytes:
    """Decodes a picture that its address holds.

    Raises:
        DataError: damaged base64.
    """
    return from_base64(address.partition(",")[2], where)


def _bitmask(address: Any, where: str) -> np.ndarray:
    """Decodes a bitmask (https://labelstud.io/tags/bitmask), bool [H, W]: a PNG in which the mask is what is opaque."""
    if not isinstance(address, str) or not address.startswith("data:image/"):
        raise DataError(f"{where}: a bitmask is a PNG as a data URL, got {address!r:.80}")
    with open_checked(f"{where}: bitmask", inline_picture(address, where), MAX_PIXELS) as image:
        if not image.has_transparency_data:
            raise DataError(f"{where}: a bitmask without transparency, which tells what is drawn; export it again")
        with pillow_errors(f"{where}: bitmask"):
            return np.array(image.convert("RGBA"))[..., 3] >= brush.OPAQUE


def shapes_of(
    regions: list[dict[str, Any]], height: int, width: int, where: str, left_out: Counter[str]
) -> Iterator[Shape]:
    """Paints the regions of a picture in their order.

    Args:
        regions: from `regions_of`.
        height, width: of the picture as it is shown, in pixels.
        where: for the error.
        left_out: counts regions without area or label.

    Raises:
        DataError: coordinates that are no numbers, a damaged brush, or a region drawn on another size.
    """
    named = labels_beside(regions)
    for region in regions:
        kind, value = _kind(region), region.get("value", {})
        here = f"{where}, region {region.get('id')!r:.40}"
        if kind is None:
            left_out[NO_AREA] += region.get("type") not in ("labels", "choices", "textarea", "rating", "relation")
            continue
        label = label_of(named, region)
        if label is None:
            left_out[NO_LABEL] += 1
            continue
        left_out[MORE_LABELS] += max(len(_own_labels(region)) - 1, 0)
        check_size((region.get("original_height"), region.get("original_width")), height, width, here)
        if region.get("image_rotation"):
            raise DataError(
                f"{here}: drawn on a picture turned by {region['image_rotation']!r:.40}; turn it back there"
            )
        if kind == "brush":
            pixels = brush.decode(value["rle"], height, width, here)
        elif kind == "bitmask":
            pixels = _bitmask(value["imageDataURL"], here)
        else:
            points = _points(kind, value, (height, width), here)
            if len(points) < 3:
                left_out[SHORT] += 1
                continue
            pixels = mask_of_polygons([points], height, width, here)
        yield Shape(pixels, label, score=score_of(region), name=here)


def _points(kind: str, value: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """Lists the corners of a region on a picture of `size` H, W in pixels, float [N, 2].

    A rectangle is turned about its upper left corner, clockwise on the screen, an ellipse about its centre
    (https://labelstud.io/templates/image_bbox, "Rotation").
    """
    scale = np.array(size[::-1]) / 100
    if kind == "polygon":
        points = value["points"]
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise DataError(f"{where}: points must be a list of [x, y], got {points!r:.80}")
        flat = [number for point in points for number in point]
    else:
        keys = ("x", "y", "width", "height") if kind == "rectangle" else ("x", "y", "radiusX", "radiusY")
        flat = [*(value.get(key) for key in keys), value.get("rotation") or 0]
    if not all(not isinstance(number, bool) and is_number(number) for number in flat):
        raise DataError(f"{where}: a coordinate is no number, in {value!r:.120}; draw it again")
    if kind == "polygon":
        return np.array(flat, float).reshape(-1, 2) * scale
    x, y, first, second, turn = flat
    if kind == "rectangle":
        around = np.array([[0, 0], [first, 0], [first, second], [0, second]], float)
    else:
        angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
        around = np.stack([first * np.cos(angle), second * np.sin(angle)], axis=1)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return (around * scale) @ np.array([[cos, sin], [-sin, cos]]) + np.array([x, y]) * scale
