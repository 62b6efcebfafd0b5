"""Generates scenes in COCO-panoptic layout: pictures worth segmenting for a machine without any data.

2-5 stuff regions split each picture, 2-15 things lie over them and over each other (see `painter`).
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldmseg_fast.data.painter import STUFF, THINGS, Painter, minimum_area
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import replacing_folder
from ldmseg_fast.panoptic.format import write_panoptic_png

__all__ = ["CATEGORIES", "generate_scene", "minimum_area", "write_scenes"]

VERSION = 1  # recorded beside generated scenes; raise it with every change that alters a pixel
SPLITS = {"train2017": 0, "val2017": 1}
SIZES = (32, 2048)
RECORD = "scenes.json"

CATEGORIES = [
    {"id": i, "name": name, "supercategory": "thing" if name in THINGS else "stuff", "isthing": int(name in THINGS)}
    for i, name in enumerate(THINGS + STUFF, start=1)
]
_CATEGORY_ID = {category["name"]: category["id"] for category in CATEGORIES}


def generate_scene(
    size: int, seed: int, index: int, split: str = "train2017"
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Generates scene `index` of a split from its four arguments alone.

    Returns:
        rgb uint8 [S, S, 3], ids int32 [S, S] without void, and segments_info (id, category_id, area, bbox, iscrowd).

    Raises:
        ArgumentError: an unknown split, a negative seed or index, or a size outside 32..2048.
    """
    _check_arguments(size, seed)
    if split not in SPLITS or index < 0:
        raise ArgumentError(f"split={split!r}, index={index}: one of {', '.join(SPLITS)} and an index from 0 expected")
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS[split], index]))
    painter = Painter(size, rng)
    rgb = painter.paint()
    ids: list[int] = []  # random and distinct, as COCO's look
    while len(ids) < len(painter.kinds):
        ids = list(dict.fromkeys([*ids, *rng.integers(1, 2**24, 8).tolist()]))[: len(painter.kinds)]
    segments_info = []
    for segment, (segment_id, kind, area) in enumerate(zip(ids, painter.kinds, painter.area), start=1):
        mask = painter.segments == segment
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, right, bottom = (int(edge) for edge in (columns[0], rows[0], columns[-1], rows[-1]))
        segments_info.append(
            {
                "id": segment_id,
                "category_id": _CATEGORY_ID[kind],
                "area": area,
                "bbox": [left, top, right - left + 1, bottom - top + 1],
                "iscrowd": 0,
            }
        )
    return rgb, np.array([0, *ids], np.int32)[painter.segments], segments_info


def write_scenes(
    out: str | os.PathLike,
    images: int,
    size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    val_images: int | None = None,
) -> Path:
    """Writes `images` training and max(images // 10, 8) validation scenes under `out`, and returns `out` as a Path.

    The folder appears complete or not at all. Where it already holds the same scenes nothing is done. Pictures are PNG:
    lossless, so that pixels do not hang on a JPEG library's version and thin objects keep their edges at 64x64.
    `workers` processes (default: one per core) share the work; the bytes do not depend on their number. `val_images` is
    another number of validation scenes; a scene is the same in folders of any numbers.

    Raises:
        ArgumentError: a number of images, a size or a seed that is out of range.
        FileExistsError: `out` holds anything else.
    """
    out = Path(out)
    if images < 1 or (val_images is not None and val_images < 1):
        raise ArgumentError(f"images={images}, val_images={val_images}: at least 1 expected")
    _check_arguments(size, seed)
    record = {"images": images, "size": size, "seed": seed, "version": VERSION}
    record |= {} if val_images is None else {"val_images": val_images}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _read_record(out) == record:
            return out
        raise FileExistsError(f"{out} exists and does not hold the scenes {record}: choose another folder or delete it")

    with replacing_folder(out) as unfinished:
        for split, count in (("train2017", images), ("val2017", val_images or max(images // 10, 8))):
            _write_split(unfinished, split, count, size, seed, workers or os.cpu_count() or 1)
        (unfinished / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return out


def _check_arguments(size: int, seed: int) -> None:
    if not SIZES[0] <= size <= SIZES[1]:
        raise ArgumentError(f"size={size}: {SIZES[0]} to {SIZES[1]} expected")
    if seed < 0:
        raise ArgumentError(f"seed={seed}: must not be negative")


def _read_record(out: Path) -> dict | None:
    try:
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_split(root: Path, split: str, count: int, size: int, seed: int, workers: int) -> None:
    for folder in (root / split, root / f"panoptic_{split}", root / "annotations"):
        folder.mkdir(exist_ok=True)
    write = partial(_write_scene, root, split, size, seed)
    progress = partial(tqdm, total=count, desc=f"scenes {split}", unit="scene", disable=None)
    if workers <= 1 or count < 200:  # for fewer, processes take longer to start than they save
        annotations = list(progress(map(write, range(count))))
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            annotations = list(progress(pool.map(write, range(count), chunksize=16)))
    images = [
        {"id": entry["image_id"], "file_name": entry["file_name"], "width": size, "height": size}
        for entry in annotations
    ]
    contents = {
        "info": {"description": f"generated scenes, size {size}, seed {seed}, version {VERSION}"},
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(contents) + "\n", encoding="utf-8")


def _write_scene(root: Path, split: str, size: int, seed: int, index: int) -> dict:
    """Writes both PNGs of one scene and returns its COCO annotation.

    Image ids differ between the splits, as in COCO.
    """
    rgb, ids, segments_info = generate_scene(size, seed, index, split)
    image_id = SPLITS[split] * 10_000_000 + index + 1
    name = f"{image_id:012d}.png"
    Image.fromarray(rgb).save(root / split / name, compress_level=1)
    write_panoptic_png(root / f"panoptic_{split}" / name, ids)
    return {"image_id": image_id, "file_name": name, "segments_info": segments_info}
