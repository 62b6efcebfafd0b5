"""Reads and writes CVAT's "Segmentation mask 1.1" (https://docs.cvat.ai/docs/dataset_management/formats/format-smask),
which is PASCAL VOC's layout, and reads "CVAT for images 1.1" by `cvat_xml`.

    labelmap.txt                      label:red,green,blue:parts:actions
    ImageSets/Segmentation/SPLIT.txt  names without ending
    SegmentationClass/NAME.png        colours of labels
    SegmentationObject/NAME.png       VOC's colours of segments, 1 to 255
    JPEGImages/NAME.jpg               pictures, where they were exported too

CVAT shows pictures turned by their EXIF orientation, and so are the masks.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.data.picture_folders import picture_suffixes
from ldmseg_fast.data.pictures import open_checked
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.formats import cvat_xml
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.drawn import (
    CATEGORIES,
    as_shown,
    as_stored,
    categories_of,
    check_size,
    known_categories,
    shown_size,
    voc_colours,
)
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.formats.trees import Tree
from ldmseg_fast.formats.voc import CLASSES
from ldmseg_fast.formats.walk import Item, Walk
from ldmseg_fast.panoptic.format import MAX_PIXELS

MOST = 255  # segments of a picture: VOC's colours but black
TOO_MANY = f"segments beyond the {MOST} largest of a picture, which become void"
CROWD = "marks of crowds; their pixels are there"
SCORE = "scores of segments"
UNLISTED = "masks that no list of ImageSets/Segmentation names"
UNDONE = "pictures without annotation, which have an empty map"
_LISTS, _CLASSES, _OBJECTS = "ImageSets/Segmentation", "SegmentationClass", "SegmentationObject"
_PICTURES = ("JPEGImages", "images", "")
BACKGROUND = "background"
_BORDER = (224, 224, 192)  # VOC's colour of pixels that nobody has to know


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads an export of masks, or `annotations.xml` of "CVAT for images".

    Labels are categories. All are things but those that `options.things` leaves out. Pixels of one label and one colour
    in SegmentationObject are a segment; pixels that have a label alone are one segment a label.

    Args:
        source: the folder or the `.zip` of an export, an XML, or a folder of several exports.
        options: `version` has no meaning.

    Raises:
        DataError: no such export, a label that labelmap.txt lacks, pictures none of which is there.
    """
    options.one_version((), "cvat")
    tree = Tree(source)
    xmls = [tree.only] if tree.only else [name for name in tree.names if PurePosixPath(name).name == "annotations.xml"]
    if xmls:
        return cvat_xml.read(tree, xmls, options)
    roots = sorted({found[1] for name in tree.names if (found := re.match(rf"((?:.*?/)?){_CLASSES}/", name))})
    if not roots:
        raise DataError(
            f"{source}: no {_CLASSES}/ of CVAT's masks and no annotations.xml; export as Segmentation mask 1.1"
        )
    labels = {root: _label_map(tree, root) for root in roots}
    names = {name for colours in labels.values() for name in colours.values()} - {BACKGROUND}
    categories = categories_of(names, options, known=known_categories(tree))
    splits: dict[str, list[Entry]] = {}
    left_out: Counter[str] = Counter()
    for root in roots:
        found_splits = _splits(tree, root)
        named = {name.replace("\\", "/") for listed in found_splits.values() for name in listed}
        left_out[UNLISTED] += len(set(_all_masks(tree, root)) - named)
        for split, listed in found_splits.items():
            splits.setdefault(split, []).extend(_entries(tree, root, listed, labels[root], categories, left_out))
    return DataSet(categories, dict(splits), dict(+left_out))


def _label_map(tree: Tree, root: str) -> dict[tuple[int, int, int], str]:
    """Reads labelmap.txt: colour -> label, in its order."""
    name = f"{root}labelmap.txt"
    if name not in tree:
        return dict(zip(voc_colours(), CLASSES))
    colours: dict[tuple[int, int, int], str] = {}
    for number, line in enumerate(tree.text(name).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        label, _, rest = line.partition(":")
        parts = rest.split(":")[0].split(",")
        here = f"{tree.where(name)}, line {number}"
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) < 256 for part in parts) or not label:
            raise DataError(f"{here}: {line!r:.80}; expected label:red,green,blue::")
        colour = (int(parts[0]), int(parts[1]), int(parts[2]))
        if colour in colours:
            raise DataError(f"{here}: {label} has the colour of {colours[colour]}; give each label its own")
        colours[colour] = label.strip()
    if not colours:
        raise DataError(f"{tree.where(name)}: no label in it")
    return colours


def _splits(tree: Tree, root: str) -> dict[str, list[str]]:
    """Lists the names of each split's pictures, without endings."""
    splits = {}
    for name in tree.below(f"{root}{_LISTS}", [".txt"]):
        lines = [line.strip().strip('"') for line in tree.text(name).splitlines()]
        splits[PurePosixPath(name).stem] = [line for line in lines if line]
    if any(splits.values()):
        return {split: list(dict.fromkeys(names)) for split, names in splits.items() if names}
    return {"default": _all_masks(tree, root)}


def _all_masks(tree: Tree, root: str) -> list[str]:
    start = f"{root}{_CLASSES}/"
    return [name[len(start) : -len(".png")] for name in tree.below(f"{root}{_CLASSES}", [".png"])]


def _entries(
    tree: Tree,
    root: str,
    names: Sequence[str],
    labels: Mapping[tuple[int, int, int], str],
    categories: list[dict[str, Any]],
    left_out: Counter[str],
) -> list[Entry]:
    pictures: dict[str, str] = {}
    for folder in reversed(_PICTURES):  # what lies in the first counts
        start = f"{root}{folder}/" if folder else root
        for path in tree.names:
            below = path[len(start) :]
            is_picture = path.startswith(start) and PurePosixPath(path).suffix.lower() in picture_suffixes()
            if is_picture and below.split("/")[0] not in (_CLASSES, _OBJECTS):
                pictures[str(PurePosixPath(below).with_suffix(""))] = path
    entries, lost = [], 0
    has_objects = bool(tree.below(f"{root}{_OBJECTS}", [".png"]))
    for name in names:
        spelled = name.replace("\\", "/")
        found = pictures.get(spelled) or pictures.get(str(PurePosixPath(spelled).with_suffix("")))
        lost += found is None
        masks = [f"{root}{folder}/{spelled}.png" for folder in (_CLASSES, _OBJECTS)]
        if not (has_objects and masks[0] in tree):  # otherwise reading says which of the two is missing
            masks = [mask if mask in tree else "" for mask in masks]
        left_out[UNDONE] += not masks[0]
        below = spelled + PurePosixPath(found).suffix if found else f"{spelled}.jpg"
        picture = tree.picture(found or f"{root}{_PICTURES[0]}/{below}")
        read_map = partial(_read, tree, masks, picture, labels, categories)
        entries.append(Entry(below, picture, read_map, sources=tree.sources(*filter(None, masks))))
    if lost and lost == len(names):
        raise DataError(
            f"{tree.where(root) if root else tree.root}: none of its {lost} pictures is there, such as {names[0]}; "
            f"export with images, or put them into {_PICTURES[0]}/"
        )
    return entries


def _read(
    tree: Tree,
    masks: Sequence[str],
    picture: Any,
    labels: Mapping[tuple[int, int, int], str],
    categories: list[dict[str, Any]],
) -> AnnotatedMap:
    class_name, object_name = masks
    height, width, turn = shown_size(picture, tree.where(class_name))
    if not class_name:
        return AnnotatedMap(np.zeros((width, height) if turn >= 5 else (height, width), np.int32), [])
    ordered = list(labels.values())
    classes, by_number = _pixels(tree, class_name, height, width)
    # a grey picture has the places of labels, a coloured one their colours
    named = dict(enumerate(ordered)) if by_number else {_number(colour): name for colour, name in labels.items()}
    named.setdefault(-1 if by_number else _number(_BORDER), BACKGROUND)
    objects = _pixels(tree, object_name, height, width)[0] if object_name else np.zeros((height, width), np.int64)
    numbers = {category["name"]: category for category in categories}
    keys, place = np.unique((classes << 24) | objects, return_inverse=True)
    segments: dict[tuple[int, int], int] = {}
    table = np.zeros(len(keys), np.int32)
    for row, key in enumerate(keys.tolist()):
        value, instance = key >> 24, key & 0xFFFFFF
        if value not in named:
            what = f"number {value}" if by_number else f"colour {[value & 255, value >> 8 & 255, value >> 16]}"
            raise DataError(f"{tree.where(class_name)}: has the {what}, which labelmap.txt lacks; add its label there")
        if named[value] == BACKGROUND:
            continue
        category = numbers[named[value]]
        of = category["id"], instance if category["isthing"] else 0
        table[row] = segments.setdefault(of, len(segments) + 1)
    annotated = AnnotatedMap(
        table[place].reshape(height, width),
        [{"id": number, "category_id": of[0], "iscrowd": 0} for of, number in segments.items()],
    )
    return as_stored(annotated, turn)


def _number(colour: tuple[int, int, int]) -> int:
    return colour[0] | colour[1] << 8 | colour[2] << 16


def _pixels(tree: Tree, name: str, height: int, width: int) -> tuple[np.ndarray, bool]:
    """Reads a mask's colours or grey values, int64 [height, width], and tells whether it is grey."""
    where = tree.where(name)
    with open_checked(where, tree.read(name, "mask"), MAX_PIXELS) as image:
        check_size((image.height, image.width), height, width, where)
        try:
            grey = image.mode in ("L", "1", "I", "I;16")
            pixels = np.array(image if grey else image.convert("RGB"), np.int64)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: damaged ({error}); export it again") from None
    return (pixels, True) if grey else (pixels @ [1, 1 << 8, 1 << 16], False)


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/SPLIT.zip, which CVAT imports as "Segmentation mask 1.1", and the pictures of its task in OUT/SPLIT.

    OUT/SPLIT has the zip's files too, and the pictures in JPEGImages, so that `read` takes OUT. OUT/categories.json
    says which categories are things.

    Raises:
        DataError: a label with a colon or a line break; a map that cannot be read; names that would replace each other.
    """
    walk = Walk(data_set, options)
    colours = _colours(data_set.categories)
    write_json(out / CATEGORIES, data_set.categories)
    names: dict[str, list[str]] = {split: [] for split in data_set.splits}
    for item in walk.items("cvat"):
        folder = out / item.split
        item.put_picture(folder / "JPEGImages" / f"{item.stem}{PurePosixPath(item.name).suffix}", options)
        ids = as_shown(item.map.ids, shown_size(item.place.entry.picture, item.name)[2])
        classes, objects = _masks(item, ids, data_set.categories, colours, walk)
        for kind, rgb in ((_CLASSES, classes), (_OBJECTS, objects)):
            path = folder / kind / f"{item.stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(rgb).save(buffer, "PNG")
            with replacing(path) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        names[item.split].append(item.stem)
    rows = "".join(f"{label}:{','.join(map(str, colour))}::\n" for label, colour in colours.items())
    for split, listed in names.items():
        folder = out / split
        (folder / _LISTS).mkdir(parents=True)
        for name, text in (("labelmap.txt", rows), (f"{_LISTS}/{split}.txt", "".join(map(_line, listed)))):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with (
            replacing(out / f"{split}.zip") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file,
        ):
            for path in sorted(folder.rglob("*")):
                name = path.relative_to(folder).as_posix()
                if path.is_file() and not name.startswith("JPEGImages/"):
                    file.write(path, name)
    return walk.summary(out)


def _line(name: str) -> str:
    """Writes a name of a list as CVAT does, in quotes where there are spaces in it."""
    return f'"{name}"\n' if len(name.split()) > 1 else f"{name}\n"


def _colours(categories: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Gives each label a colour of its own, black being the background."""
    found: dict[str, tuple[int, ...]] = {BACKGROUND: (0, 0, 0)}
    taken = {(0, 0, 0), _BORDER}
    free = chain(voc_colours(), product(range(256), repeat=3))
    wanted = [tuple(each.get("color") or ()) for each in categories]
    taken |= {colour for colour in wanted if wanted.count(colour) == 1}
    for category, colour in zip(categories, wanted):
        name = category["name"]
        if ":" in name or name.startswith("#") or not name.isprintable() or name != name.strip():
            raise DataError(f"category {name!r}: labelmap.txt cannot hold this name; rename it, without `:` and `#`")
        if name in found:
            raise DataError(f"category {name!r}: labelmap.txt has this name already; rename one")
        usable = len(colour) == 3 and all(type(part) is int and 0 <= part <= 255 for part in colour)
        if not usable or colour in found.values() or colour == _BORDER:
            colour = next(each for each in free if each not in taken)
        found[name] = colour
        taken.add(colour)
    return found


def _masks(
    item: Item,
    ids: np.ndarray,
    categories: Sequence[Mapping[str, Any]],
    colours: Mapping[str, tuple[int, ...]],
    walk: Walk,
) -> tuple[np.ndarray, np.ndarray]:
    """Paints both masks, uint8 [H, W, 3], of a map as it is shown."""
    segments = item.map.segments
    present, place, areas = np.unique(ids, return_inverse=True, return_counts=True)
    area = dict(zip(present.tolist(), areas.tolist()))
    kept = sorted(segments, key=lambda segment: -area[segment["id"]])[:MOST]
    walk.leave_out(TOO_MANY, len(segments) - len(kept), item.name)
    walk.leave_out(CROWD, sum(bool(segment.get("iscrowd")) for segment in kept), item.name)
    walk.leave_out(SCORE, sum("score" in segment for segment in kept), item.name)
    names = {category["id"]: category["name"] for category in categories}
    palette = voc_colours()
    tables = np.zeros((2, len(present), 3), np.uint8)
    rows = {number: row for row, number in enumerate(present.tolist())}
    for number, segment in enumerate(sorted(kept, key=lambda segment: segment["id"]), 1):
        tables[0, rows[segment["id"]]] = colours[names[segment["category_id"]]]
        tables[1, rows[segment["id"]]] = palette[number]
    classes, objects = tables[:, place.ravel()].reshape(2, *ids.shape, 3)
    return classes, objects
