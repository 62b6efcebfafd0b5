"""Reads JSONs of COCO's instances and stuff (cocodataset.org/#format-data, "Object Detection" and "Stuff
Segmentation"), from COCO itself or from a tool that exports them.

A mask is a list of polygons, or run lengths, compressed or not. `panoptic.coco_masks` decodes both as pycocotools does.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldmseg_fast.data.pictures import decode_picture, stored_size
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.drawn import score_of, with_things
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.painting import Mask, paint
from ldmseg_fast.formats.trees import Tree, check_one_name, plain_name
from ldmseg_fast.panoptic.annotations import MAX_NUMBER
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons, mask_of_rle
from ldmseg_fast.panoptic.format import MAX_PIXELS, MAX_SIDE

NO_MASK = "annotations without a mask, such as boxes"
SHORT = "polygons of under 3 points"
OTHER = "annotations of `other` in a stuff file, which stands for all things"


@dataclass(frozen=True)
class CocoFile:
    """Describes one JSON.

    Attributes:
        name: in the tree.
        split: that it belongs to; several JSONs of one split are joined.
        folders: of the tree, in which its pictures are looked for.
        stuff: whether its categories are stuff where they do not say it themselves.
        placeholder: whether its category 0 may be no class but what the others have as `supercategory`.
    """

    name: str
    split: str
    folders: tuple[str, ...]
    stuff: bool = False
    placeholder: bool = False


@dataclass
class _Split:
    files: list[CocoFile] = field(default_factory=list)
    images: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[int | str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """Holds what is common to all pictures of a split."""

    tree: Tree
    where: str
    things: frozenset[int]
    sources: tuple[Path, ...]


def data_set_of(tree: Tree, files: Sequence[CocoFile], options: ReadOptions) -> DataSet:
    """Makes a data set of JSONs.

    Raises:
        DataError: one that cannot be read or is none of this kind, or whose annotations name images or categories that
            it does not list; two that contradict each other; pictures none of which is there.
    """
    categories: dict[int, dict[str, Any]] = {}
    splits: dict[str, _Split] = {}
    left_out: Counter[str] = Counter()
    for file in files:
        if options.splits and file.split not in options.splits:
            splits.setdefault(file.split, _Split())  # the command says which there are
            continue
        content, where = tree.json(file.name), tree.where(file.name)
        for other in splits[file.split].files if file.split in splits else ():
            if other.stuff == file.stuff or other.folders != file.folders:
                raise DataError(
                    f"{tree.where(other.name)} and {where}: both are the split {file.split}; import each into a folder "
                    "of its own, or rename one"
                )
        _check_lists(content, where)
        listed = _categories(content["categories"], file, where)
        if file.placeholder and _is_placeholder(listed, content["annotations"]):
            del listed[0]
        for number, category in listed.items():
            known = categories.setdefault(number, category)
            if known["name"] != category["name"]:
                raise DataError(
                    f"{where}: category {number} is {category['name']!r}, in another file {known['name']!r}; import "
                    "them into folders of their own"
                )
        _add(splits.setdefault(file.split, _Split()), file, content, listed, where, left_out)
    listed_categories = with_things(list(categories.values()), options)
    things = frozenset(each["id"] for each in listed_categories if each["isthing"])
    entries: dict[str, Sequence[Entry]] = {}
    for name, split in splits.items():
        own = {folder for file in files if file.split == name for folder in file.folders}
        others = [folder for file in files if file.split != name for folder in file.folders[:2] if folder not in own]
        entries[name] = _entries(split, tree, things, [folder for folder in others if folder])
    return DataSet(listed_categories, entries, dict(+left_out))


def is_coco(content: Any) -> bool:
    """Tells whether a JSON's content looks like COCO's instances: three lists, and annotations with masks or boxes."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _LISTS):
        return False
    annotations = [each for each in content["annotations"] if isinstance(each, dict)]
    return not content["annotations"] or any(
        key in each for each in annotations[:1] for key in ("segmentation", "bbox")
    )


_LISTS = ("images", "annotations", "categories")


def _check_lists(content: Any, where: str) -> None:
    if isinstance(content, list):
        raise DataError(f"{where}: a list, as results are; a data set is an object with {', '.join(_LISTS)}")
    for key in _LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{where}: no list `{key}`; COCO's JSON has {', '.join(_LISTS)}")
        for place, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise DataError(f"{where}: {key}[{place}] must be an object, got {entry!r:.80}")


def _categories(listed: list[dict[str, Any]], file: CocoFile, where: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for place, category in enumerate(listed):
        number, name, isthing = category.get("id"), category.get("name"), category.get("isthing", int(not file.stuff))
        if type(number) is not int or not 0 <= number <= MAX_NUMBER or number in found:
            raise DataError(f"{where}: categories[{place}]: id {number!r:.80}; each needs a number of its own")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: categories[{place}]: name {name!r:.80}; give it a text")
        if isthing not in (0, 1):
            raise DataError(f"{where}: categories[{place}]: isthing {isthing!r:.80}: 0 or 1 expected")
        extra: dict[str, Any] = {key: category[key] for key in ("supercategory", "color") if key in category}
        found[number] = {"id": number, "name": name, "isthing": int(bool(isthing)), **extra}
    return found


def _is_placeholder(categories: Mapping[int, Mapping[str, Any]], annotations: list[dict[str, Any]]) -> bool:
    above = [category.get("supercategory") for number, category in categories.items() if number != 0]
    return 0 in categories and categories[0]["name"] in above and all(a.get("category_id") != 0 for a in annotations)


def _add(
    split: _Split,
    file: CocoFile,
    content: dict[str, Any],
    categories: Mapping[int, Mapping[str, Any]],
    where: str,
    left_out: Counter[str],
) -> None:
    """Adds a JSON's images and annotations to its split."""
    split.files.append(file)
    own = set()
    for place, image in enumerate(content["images"]):
        number, name = image.get("id"), image.get("file_name")
        if type(number) not in (int, str) or number in own:
            raise DataError(f"{where}: images[{place}]: id {number!r:.80}; each needs one of its own")
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise DataError(f"{where}: image {number!r}: file_name {name!r:.80}; name its picture")
        own.add(number)
        if split.images.setdefault(number, image)["file_name"] != name:
            raise DataError(f"{where}: image {number!r} is {name}, in another file {split.images[number]['file_name']}")
    kept = []
    for annotation in content["annotations"]:
        other = file.stuff and categories.get(annotation.get("category_id"), {}).get("name") == "other"
        left_out[OTHER] += other
        if not other:
            kept.append(annotation)
    for key, known, listed in (("image_id", own, "images"), ("category_id", set(categories), "categories")):
        wrong = [each for each in kept if not _is_in(each.get(key), known)]
        if wrong:
            first = f"annotation {wrong[0].get('id')!r} has {key} {wrong[0].get(key)!r:.80}"
            raise DataError(f"{where}: {len(wrong)} annotations name what `{listed}` does not list; {first}")
    for annotation in kept:
        split.annotations.setdefault(annotation["image_id"], []).append(annotation)


def _is_in(value: Any, known: set[Any]) -> bool:
    return type(value) in (int, str) and value in known


def _entries(split: _Split, tree: Tree, things: frozenset[int], others: Sequence[str]) -> list[Entry]:
    if not split.files:
        return []
    names = [file.name for file in split.files]
    source = _Source(tree, " and ".join(map(tree.where, names)), things, tree.sources(*names))
    folders = list(dict.fromkeys(folder for file in split.files for folder in file.folders))
    entries, lost, met = [], 0, dict[str, str]()
    for number, image in split.images.items():
        name = image["file_name"]
        found = tree.find(name, folders, others)
        lost += found is None
        if found is not None:
            check_one_name(met, found, plain_name(name), source.where)
        picture = tree.picture(found or posixpath.join(folders[0], plain_name(name)))
        read = partial(_read, source, image, picture, split.annotations.get(number, []))
        entries.append(Entry(plain_name(name), picture, read, number, source.sources))
    if lost and lost == len(entries):
        places = ", ".join(tree.where(folder) if folder else str(tree.root) for folder in folders)
        first = next(iter(split.images.values()))["file_name"]
        raise DataError(f"{source.where}: none of its {lost} pictures is there, such as {first}; looked in {places}")
    return entries


def _read(source: _Source, image: dict[str, Any], picture: Any, annotations: list[dict[str, Any]]) -> AnnotatedMap:
    where = f"{source.where}: image {image['id']!r} ({image['file_name']})"
    height, width = image_size(image, picture, where)
    left_out: Counter[str] = Counter()
    masks = _masks(source, annotations, height, width, where, left_out)
    annotated = paint(masks, height, width)
    return replace(annotated, left_out=dict(Counter(annotated.left_out) + left_out))


def image_size(image: Mapping[str, Any], picture: Any, where: str) -> tuple[int, int]:
    """Returns (H, W) as a JSON says it, or as the picture has it where it does not.

    Raises:
        DataError: sides that are no numbers of pixels, or too many of them.
    """
    height, width = image.get("height"), image.get("width")
    if height is None or width is None:
        if isinstance(picture, Path):
            return stored_size(picture)
        return decode_picture(picture if isinstance(picture, bytes) else picture(), where, exif=False).stored_size
    sides = [int(side) for side in (height, width) if _is_side(side)]
    if len(sides) != 2 or sides[0] * sides[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: height {height!r:.40} and width {width!r:.40}: sides of 1 to {MAX_SIDE} and up to {MAX_PIXELS} "
            "pixels are read"
        )
    return sides[0], sides[1]


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= MAX_SIDE and value == int(value)


def _masks(
    source: _Source, annotations: list[dict[str, Any]], height: int, width: int, where: str, left_out: Counter[str]
) -> Iterator[Mask]:
    for annotation in annotations:
        here = f"{where}, annotation {annotation.get('id')!r}"
        shape = annotation.get("segmentation")
        if isinstance(shape, dict):
            pixels = mask_of_rle(shape, here)
            if pixels.shape != (height, width):
                raise DataError(
                    f"{here}: its mask is {pixels.shape[1]}x{pixels.shape[0]}, the picture {width}x{height}; export it "
                    "again"
                )
        elif isinstance(shape, list) and shape:
            polygons = [shape] if isinstance(shape[0], int | float) else shape  # some tools leave a list out
            long = [polygon for polygon in polygons if not isinstance(polygon, list) or _points_in(polygon) >= 3]
            left_out[SHORT] += len(polygons) - len(long)
            if not long:
                continue
            pixels = mask_of_polygons(long, height, width, here)
        elif shape in (None, []):
            left_out[NO_MASK] += 1
            continue
        else:
            raise DataError(f"{here}: segmentation must be polygons or run lengths, got {shape!r:.80}")
        category_id = annotation["category_id"]
        yield Mask(
            pixels,
            category_id,
            isthing=category_id in source.things,
            iscrowd=_is_crowd(annotation, here),
            score=score_of(annotation),
            name=here,
        )


def _points_in(polygon: list[Any]) -> float:
    return len(polygon) / (1 if polygon and isinstance(polygon[0], list) else 2)  # [[x, y], ...] or [x, y, ...]


def _is_crowd(annotation: Mapping[str, Any], where: str) -> bool:
    """Tells whether an annotation stands for several instances. CVAT marks every mask that is no polygon as one.

    CVAT's annotations have `attributes` with `occluded` (datumaro/plugins/data_formats/coco/exporter.py).
    """
    attributes = annotation.get("attributes")
    by_cvat = isinstance(attributes, dict) and "occluded" in attributes
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise DataError(f"{where}: iscrowd {annotation['iscrowd']!r:.80}: 0 or 1 expected")
    return annotation.get("iscrowd") == 1 and not by_cvat
