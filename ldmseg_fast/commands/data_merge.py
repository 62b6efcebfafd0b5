"""`ldmseg data merge` makes one split of splits of several COCO-panoptic folders, for class-agnostic training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast.data.folders import find_split
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import replacing
from ldmseg_fast.locks import only_writer
from ldmseg_fast.outputs import check_outputs
from ldmseg_fast.panoptic.format import load_panoptic_json

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
        DataError: a source that is not there or is written otherwise, or a split that OUT has already.
        ArgumentError: OUT's pictures or maps would lie among a source's.
        InUseError: another merge writes into OUT.
    """
    out = Path(out)
    path = out / "annotations" / f"panoptic_{split}.json"
    parts = [_parse(source) for source in sources]
    folders = {"pictures of OUT": out / split, "maps of OUT": out / f"panoptic_{split}"}
    splits = [find_split(root, name) for root, name, _ in parts]
    check_outputs({}, folders, inputs=[folder for each in splits for folder in (each.images, each.maps)])
    with only_writer(out, "a merge", "or choose another folder"):
        return _merge(out, parts, split, path)


def _merge(out: Path, parts: Sequence[tuple[str, str, int]], split: str, path: Path) -> int:
    if path.exists():
        raise DataError(f"{path} is there already; choose another folder or --split")
    content: dict[str, Any] = {"info": {}, "images": [], "annotations": [], "categories": [OBJECT]}
    for number, (root, name, limit) in enumerate(parts):
        folders = find_split(root, name)
        found = load_panoptic_json(folders.annotations)
        images = {image["id"]: image for image in found["images"]}
        numbers: dict[int, int] = {}
        for annotation in found["annotations"][: limit or None]:
            image = images[annotation["image_id"]]
            if image["id"] not in numbers:
                numbers[image["id"]] = len(content["images"]) + 1
                picture = _link(out / split, f"{number}_{image['file_name']}", folders.images / image["file_name"])
                size = {"height": image["height"], "width": image["width"]}
                content["images"].append({"id": numbers[image["id"]], "file_name": picture, **size})
            ids = _link(
                out / f"panoptic_{split}", f"{number}_{annotation['file_name']}", folders.maps / annotation["file_name"]
            )
            segments = [segment | {"category_id": 1} for segment in annotation["segments_info"]]
            entry = {"image_id": numbers[image["id"]], "file_name": ids, "segments_info": segments}
            content["annotations"].append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return len(content["annotations"])


def _parse(source: str) -> tuple[str, str, int]:
    parts = source.split(":")
    if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and not parts[2].isdigit()):
        raise DataError(f"{source!r}: ROOT:SPLIT or ROOT:SPLIT:N expected, such as coco:train2017")
    return parts[0], parts[1], int(parts[2]) if len(parts) == 3 else 0


def _link(folder: Path, name: str, target: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if link.is_symlink() and link.resolve() != target.resolve():
        link.unlink()  # of a merge of other sources, which was killed
    if not link.is_symlink():
        link.symlink_to(target.resolve())
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder of links and one JSON; the sources stay as they are")
    parser.add_argument("sources", nargs="+", metavar="ROOT:SPLIT[:N]", help="a split, or its first N annotated maps")
    parser.add_argument("--split", default="train2017", help="name of the new split")


def run(args: argparse.Namespace) -> int:
    count = merge_splits(args.out, args.sources, args.split)
    print(f"{count} annotated maps: {args.out}")
    return 0
