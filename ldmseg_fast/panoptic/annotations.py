"""Reads COCO panoptic JSONs strictly. Every command reads them here, so what one command refuses all refuse.

The format is cocodataset.org/#format-data, "Panoptic Segmentation". Ids of segments are whole numbers in 1..2^24-1, ids
of categories in 0..2^31-1, ids of images are whole numbers or texts. `iscrowd` is 0 or 1 (or false or true). `area`,
`height` and `width` are whole numbers of pixels; 12.0 counts as 12. A number in quotes, null, NaN or a key that an
object has twice is refused.
"""

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.files import read_file, text_of
from ldmseg_fast.native import _C

MAX_ID = 2**24 - 1
MAX_NUMBER = 2**31 - 1  # of categories, areas and sides: what the tables of the metrics hold

_LISTS = {"images": "id", "annotations": "image_id", "categories": "id"}  # and what tells their entries apart
_REPEATED = {"images": "duplicated image id", "annotations": "duplicated annotation"}


@dataclass(frozen=True)
class Fault:
    """Describes one thing that is wrong with a JSON.

    Attributes:
        kind: what `ldmseg data check` counts it under.
        message: the entry, the value and the cure.
    """

    kind: str
    message: str


class _Repeated(dict):
    """Holds an object of a JSON in which keys are there more than once; the last value of each counts."""

    repeated: frozenset[str] = frozenset()


def load_panoptic_json(path: str | Path, *, predictions: bool = False) -> dict[str, Any]:
    """Loads a COCO panoptic JSON and checks its `images`, `annotations` and `categories`.

    With `predictions=True` only `annotations` is required, as in panopticapi; what is there is still checked.

    Raises:
        PanopticFormatError: names the file, the entry and the value of the first fault of `check_panoptic_json`.
        OSError: a file that cannot be read.
    """
    if stream_panoptic_json(path, predictions=predictions) is not None:
        return without_collector(lambda: json.loads(read_file(path, PanopticFormatError, "JSON file")))
    return judge_panoptic_json(path, predictions=predictions)


def judge_panoptic_json(path: str | Path, *, predictions: bool = False) -> dict[str, Any]:
    """Loads a JSON as `load_panoptic_json` does, without asking C++ first.

    Raises:
        PanopticFormatError: see `load_panoptic_json`.
        OSError: a file that cannot be read.
    """
    content, faults = check_panoptic_json(path, predictions=predictions)
    for first in faults:
        more = sum(fault.kind == first.kind for fault in faults)
        raise PanopticFormatError(f"{path}: {first.message}" + (f" ({more} more of this kind)" if more else ""))
    return content


def check_panoptic_json(path: str | Path, *, predictions: bool = False) -> tuple[Any, Iterator[Fault]]:
    """Reads a COCO panoptic JSON and gives everything that is wrong with it.

    Returns:
        The content, None where the file is no JSON, and the faults. A file without faults is one that
        `load_panoptic_json` loads.

    Raises:
        PanopticFormatError: a folder, pipe or device.
        OSError: a file that cannot be read.
    """
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    raw = read_file(path, PanopticFormatError, "JSON file")
    try:
        text = text_of(raw)
        content = without_collector(
            lambda: json.loads(text, parse_constant=constant, object_pairs_hook=_object_of_pairs)
        )
    except (ValueError, RecursionError) as error:  # not JSON, not text, numbers of thousands of digits, deep nesting
        return None, iter([Fault("unreadable JSON", f"not a JSON file ({error})")])
    fault = cache(lambda name: _constant_fault(text, name))  # of each name the first place is told
    return content, chain(_faults(content, predictions), map(fault, constants))


def stream_panoptic_json(path: str | Path, *, predictions: bool = False) -> Any:
    """Gives C++'s index of a JSON that is plainly right.

    Returns:
        `_C.AnnotationIndex`; None for a file with faults, for legal rarities such as escapes in names or areas with a
        point, which Python reads, and where C++ is not built.
    """
    if _C is None or not Path(path).is_file():
        return None
    try:
        index = _C.AnnotationIndex(os.fsencode(path), predictions)
        categories = json.loads(index.categories or "[]", object_pairs_hook=_object_of_pairs, parse_constant=_refuse)
    except ValueError:
        return None
    if any(category_faults(categories)):
        return None
    unlisted = set(index.used_categories) - {category["id"] for category in categories}
    return None if index.categories and unlisted else index


def without_collector(read: Any) -> Any:
    """Calls `read` without the garbage collector, which would go over the growing tree again and again for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return read()
    finally:
        if enabled:
            gc.enable()


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return repeated


def _refuse(name: str) -> float:
    raise ValueError(name)


def _constant_fault(text: str, name: str) -> Fault:
    place = re.search(rf'"[^"]*"\s*:\s*{name}|{name}', text)
    assert place is not None  # the parser has met it
    line = text.count("\n", 0, place.start()) + 1
    return Fault("NaN or infinity", f"line {line}: {place[0]:.80} is no JSON value; write a number or leave it out")


def _faults(content: Any, predictions: bool) -> Iterator[Fault]:
    """Gives the faults of a JSON's content; where lists or objects are missing, these alone."""
    broken = list(_structure_faults(content, predictions))
    yield from broken
    if broken:
        return
    if not predictions and not content["annotations"]:
        yield Fault("empty split", "the split is empty, no annotations")
    image_ids: set[Any] = set()
    for place, image in enumerate(content.get("images", ())):
        yield from _id_faults("images", place, image, image_ids)
        yield from _image_faults(image, predictions)
    if "categories" in content:
        yield from category_faults(content["categories"])
        category_ids = {c.get("id") for c in content["categories"] if type(c.get("id")) is int}
    annotated: set[Any] = set()
    for place, annotation in enumerate(content["annotations"]):
        yield from _id_faults("annotations", place, annotation, annotated)
    if "images" in content:
        missing = annotated - image_ids
        spelled = {str(image_id): image_id for image_id in image_ids} if missing else {}
        for unlisted in sorted(missing, key=str):
            twin = spelled.get(str(unlisted))
            cure = f"; there it is {twin!r}: write both alike" if twin is not None else ""
            message = f"annotations of images that `images` does not list: {unlisted!r}{cure}"
            yield Fault("annotation without image", message)
    for annotation in content["annotations"]:
        yield from _annotation_faults(annotation, category_ids if "categories" in content else None)


def _structure_faults(content: Any, predictions: bool) -> Iterator[Fault]:
    if not isinstance(content, dict):
        yield _unreadable(f"expected an object with `annotations`, got a {type(content).__name__}")
        return
    yield from _repetitions(content, "the file", _LISTS)
    required = ("annotations",) if predictions else tuple(_LISTS)
    for key, field in _LISTS.items():
        if key not in content:
            if key in required:
                yield _unreadable(f"`{key}` is missing; a COCO panoptic JSON has {', '.join(required)}")
        elif not isinstance(content[key], list):
            yield _unreadable(f"`{key}` must be a list, got {type(content[key]).__name__}")
        else:
            wrong = next((place for place, entry in enumerate(content[key]) if not isinstance(entry, dict)), None)
            if wrong is not None:
                got = f"{content[key][wrong]!r:.80}"
                yield _unreadable(f"{key}[{wrong}] has no usable `{field}`: expected an object, got {got}")


def _unreadable(message: str) -> Fault:
    return Fault("unreadable JSON", message)


def _id_faults(key: str, place: int, entry: dict[str, Any], seen: set[Any]) -> Iterator[Fault]:
    """Checks what tells an entry of `images` or `annotations` apart, and adds it to `seen`."""
    field = _LISTS[key]
    value = entry.get(field)
    if not (type(value) is int and -(2**63) <= value < 2**63) and not _is_text(value):
        message = f"{key}[{place}] has no usable `{field}` (got {value!r:.80}); give it a whole number or a text"
        yield Fault("image id that is no number or text", message)
        return
    if value in seen:
        yield Fault(_REPEATED[key], f"{key}[{place}]: `{field}` {value!r} appears twice; keep one entry")
    seen.add(value)


def _image_faults(image: dict[str, Any], predictions: bool) -> Iterator[Fault]:
    where = f"image {image.get('id')!r:.80}"
    yield from _repetitions(image, where, ("id", "file_name", "height", "width"))
    if not _is_file_name(image.get("file_name")) and ("file_name" in image or not predictions):
        message = f"{where} has no file_name of a picture, got {image.get('file_name')!r:.80}; name its file"
        yield Fault("image without file name", message)
    for key in ("height", "width"):
        if key in image and not _is_whole(image[key], 1):
            message = f"{where}: `{key}` must be a whole number of pixels, got {image[key]!r:.80}; {_cure(image[key])}"
            yield Fault("size that is no number of pixels", message)


def category_faults(categories: Any) -> Iterator[Fault]:
    """Gives the faults of a list of categories."""
    seen = set()
    for place, category in enumerate(categories):
        if not isinstance(category, dict):
            yield _unreadable(f"categories[{place}] has no usable `id`: expected an object, got {category!r:.80}")
            continue
        where = f"categories[{place}]"
        yield from _repetitions(category, where, ("id", "name", "isthing"))
        category_id = category.get("id")
        if type(category_id) is not int or not 0 <= category_id <= MAX_NUMBER:
            message = f"{where} has no usable `id` (got {category_id!r:.80}); give it a whole number in 0..{MAX_NUMBER}"
            yield Fault("category id outside 0..2^31-1", message)
        elif category_id in seen:
            yield Fault("duplicated category id", f"{where}: `id` {category_id} appears twice; keep one entry")
        else:
            seen.add(category_id)
        where = f"category {category_id!r:.80}"
        isthing = category.get("isthing", 1)
        if not _is_flag(isthing):
            message = f"{where}: `isthing` must be 0 or 1, got {isthing!r:.80}; {_cure(isthing)}"
            yield Fault("isthing that is not 0 or 1", message)
        if "name" in category and not _is_text(category["name"]):
            message = f"{where}: `name` must be a text, got {category['name']!r:.80}; give it one or leave it out"
            yield Fault("category name that is no text", message)


def _annotation_faults(annotation: dict[str, Any], category_ids: set[int] | None) -> Iterator[Fault]:
    where = f"image {annotation.get('image_id')!r:.80}"
    yield from _repetitions(annotation, where, ("image_id", "file_name", "segments_info"))
    name, segments = annotation.get("file_name"), annotation.get("segments_info")
    if not _is_file_name(name):
        yield Fault("incomplete annotation", f"{where}: `file_name` must name a PNG, got {name!r:.80}")
    if not isinstance(segments, list):
        yield Fault("incomplete annotation", f"{where}: `segments_info` must be a list, got {segments!r:.80}")
        return
    seen = set()
    for segment in segments:
        if not isinstance(segment, dict):
            message = f"{where}: a segment id must be an integer in 1..{MAX_ID}, got {segment!r:.80} for a segment"
            yield Fault("segment id outside 1..2^24-1", message)
            continue
        segment_id, category_id = segment.get("id"), segment.get("category_id")
        crowd, area = segment.get("iscrowd", 0), segment.get("area", 0)
        here = f"{where}: segment {segment_id!r:.80}"
        if type(segment_id) is not int or not 1 <= segment_id <= MAX_ID:
            message = f"{where}: a segment id must be an integer in 1..{MAX_ID}, got {segment_id!r:.80}"
            yield Fault("segment id outside 1..2^24-1", f"{message}; renumber it in the JSON and the map")
        elif segment_id in seen:
            message = f"{where}: segment id {segment_id} appears twice in segments_info; keep one entry"
            yield Fault("duplicated segment id", message)
        else:
            seen.add(segment_id)
        if type(category_id) is not int or not (
            0 <= category_id <= MAX_NUMBER if category_ids is None else category_id in category_ids
        ):
            message = f"{here} has unknown category_id {category_id!r:.80}"
            cure = "give it one of `categories`" if type(category_id) is int else _cure(category_id)
            yield Fault("unknown category id", f"{message}; {cure}")
        if not _is_flag(crowd):
            message = f"{here}: `iscrowd` must be 0 or 1, got {crowd!r:.80}; {_cure(crowd)}"
            yield Fault("iscrowd that is not 0 or 1", message)
        if not _is_whole(area, 0):
            message = f"{here}: `area` must be a whole number of pixels, got {area!r:.80}; count them or leave it out"
            yield Fault("area that is no number of pixels", message)
        if type(segment) is _Repeated:
            yield from _repetitions(segment, here, ("id", "category_id", "iscrowd", "area"))


def _repetitions(entry: dict[str, Any], where: str, keys: Iterable[str]) -> Iterator[Fault]:
    if isinstance(entry, _Repeated):
        for key in sorted(entry.repeated.intersection(keys)):
            yield Fault("repeated key", f"{where} has the key `{key}` twice; keep one")


def _is_whole(value: Any, least: int) -> bool:
    return type(value) in (int, float) and least <= value <= MAX_NUMBER and value == int(value)


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool, float) and value in (0, 1)


def has_surrogates(text: str) -> bool:
    """Tells whether a text has half of a surrogate pair in it, which UTF-8 cannot write."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def _is_text(value: Any) -> bool:
    """Tells whether a value is a text that a file can hold: half of a surrogate pair is none."""
    return isinstance(value, str) and value != "" and not has_surrogates(value)


def _is_file_name(value: Any) -> bool:
    return _is_text(value) and "\0" not in value


def _cure(value: Any) -> str:
    if isinstance(value, str):
        return "write it as a number, without quotes"
    return "give its number, or leave the key out" if value is None else "correct it"
