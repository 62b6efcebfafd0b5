"""`ldmseg data merge` makes one split of splits of several COCO-panoptic folders, for class-agnostic training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.data.folders import SplitFolders, find_split
from ldmseg_fast.data.pictures import stored_size
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import real_path, replacing
from ldmseg_fast.locks import only_writer
from ldmseg_fast.outputs import check_outputs
from ldmseg_fast.panoptic.annotations import load_panoptic_json
from ldmseg_fast.panoptic.splits import check_split_name

OBJECT = {"id": 1, "name": "object", "supercategory": "object", "isthing": 1, "color": [220, 20, 60]}


def merge_splits(out: str | Path, sources: Sequence[str], split: str = "train2017") -> int:
    """Links the sources' pictures and maps under OUT, beside one JSON in which every segment is an object.

    Args:
        out: a folder without this split.
        sources: ROOT:SPLIT, or ROOT:SPLIT:N for its first N annotated maps.
        split: the new one's name.

    Returns:
        How many annotated maps it has.

    Raises:
        DataError: a source that is not there, lacks files, has fewer maps than asked for or is written otherwise, or a
            split that OUT has already or that is no name.
        PanopticFormatError: a source's JSON that no command reads, see `load_panoptic_json`.
        ArgumentError: OUT's pictures or maps would lie among a source's.
        InUseError: another merge writes into OUT.
    """
    check_split_name(split)
    out = Path(out)
    path = out / "annotations" / f"panoptic_{split}.json"
    parts = [_parse(source) for source in sources]
    folders = {"pictures of OUT": out / split, "maps of OUT": out / f"panoptic_{split}"}
    splits = [find_split(root, name) for root, name, _ in parts]
    check_outputs({}, folders, inputs=[folder for each in splits for folder in (each.images, each.maps)])
    with only_writer(out, "a merge", "or choose another folder"):
        return _merge(out, [(folders, limit) for folders, (_, _, limit) in zip(splits, parts)], split, path)


def _merge(out: Path, parts: Sequence[tuple[SplitFolders, int]], split: str, path: Path) -> int:
    if path.exists():
        raise DataError(f"{path} is there already; choose another folder or --split")
    content: dict[str, Any] = {"info": {}, "images": [], "annotations": [], "categories": [OBJECT]}
    links: dict[Path, Path] = {}
    for number, (folders, limit) in enumerate(parts):
        found = load_panoptic_json(folders.annotations)
        images = {image["id"]: image for image in found["images"]}
        annotations = found["annotations"][: limit or None]
        if len(annotations) < limit:
            raise DataError(
                f"{folders.annotations}: {limit} annotated maps are asked for and {len(annotations)} are there; ask "
                "for no more, or leave the number out for all"
            )
        pictures = [images[annotation["image_id"]]["file_name"] for annotation in annotations]
        folders.check_files(pictures, [annotation["file_name"] for annotation in annotations])
        numbers: dict[int | str, int] = {}
        for annotation in annotations:
            image = images[annotation["image_id"]]
            if image["id"] not in numbers:
                numbers[image["id"]] = len(content["images"]) + 1
                target = folders.images / image["file_name"]
                picture = _name_of_link(number, image["file_name"], len(content["images"]))
                links[out / split / picture] = target
                height, width = _size(image, target)
                content["images"].append(
                    {"id": numbers[image["id"]], "file_name": picture, "height": height, "width": width}
                )
            ids = _name_of_link(number, annotation["file_name"], len(content["annotations"]))
            links[out / f"panoptic_{split}" / ids] = folders.maps / annotation["file_name"]
            segments = [segment | {"category_id": 1} for segment in annotation["segments_info"]]
            entry = {"image_id": numbers[image["id"]], "file_name": ids, "segments_info": segments}
            content["annotations"].append(entry)
    for link, target in links.items():
        _link(link, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return len(content["annotations"])


def _parse(source: str) -> tuple[str, str, int]:
    parts = source.split(":")
    if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and not (parts[2].isdecimal() and int(parts[2]))):
        raise DataError(f"{source!r}: ROOT:SPLIT or ROOT:SPLIT:N expected, N at least 1, such as coco:train2017")
    return parts[0], parts[1], int(parts[2]) if len(parts) == 3 else 0


def _name_of_link(number: int, name: str, place: int) -> str:
    """Names a file of a source in the merged folder, in the sub-folder that it has in the source."""
    parts = PurePosixPath(name)
    outside = parts.is_absolute() or ".." in parts.parts
    return f"{number}_{place}_{parts.name}" if outside else f"{number}_{parts}"


def _size(image: dict[str, Any], path: Path) -> tuple[int, int]:
    """Returns height and width in pixels by the JSON, or by the picture where the JSON does not give both.

    Raises:
        DataError: a picture that cannot be read.
    """
    if "height" in image and "width" in image:
        return int(image["height"]), int(image["width"])
    try:
        return stored_size(path)
    except DataError as error:
        raise DataError(f"{error}; the JSON does not give its size") from error


def _link(link: Path, target: Path) -> None:
    """Makes a link, also in the place of another one that an interrupted merge has left."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.readlink() != real_path(target):
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(real_path(target))


EXAMPLES = ("ldmseg data merge merged coco:train2017 scenes:train2017:1000",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder of links and one JSON; the sources stay as they are")
    parser.add_argument("sources", nargs="+", metavar="ROOT:SPLIT[:N]", help="a split, or its first N annotated maps")
    parser.add_argument("--split", default="train2017", help="name of the new split")


def run(args: argparse.Namespace) -> int:
    count = merge_splits(args.out, args.sources, args.split)
    print(f"{count} annotated maps: {args.out}")
    return 0
