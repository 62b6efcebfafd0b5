"""Generates scenes in COCO-panoptic layout: pictures worth segmenting for a machine without any data.

2-5 stuff regions split each picture, 2-15 things lie over them and over each other. Version 1 (`painter`) has 8 kinds
of things and 6 of stuff, several of which look alike. Version 2 (`class_painter`) has 13 and 6, which can be told from
their looks.
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

from ldmseg_fast.data import class_painter, painter
from ldmseg_fast.data.painter import minimum_area
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import replacing_folder
from ldmseg_fast.panoptic.format import write_panoptic_png

__all__ = ["CATEGORIES", "VERSION", "generate_scene", "minimum_area", "write_scenes"]

VERSION = 2  # the newest; a change that alters a pixel makes another
SPLITS = {"train2017": 0, "val2017": 1}
SIZES = (32, 2048)
RECORD = "scenes.json"


def _categories(things: tuple[str, ...], stuff: tuple[str, ...]) -> list[dict]:
    return [
        {"id": i, "name": name, "supercategory": "thing" if name in things else "stuff", "isthing": int(name in things)}
        for i, name in enumerate(things + stuff, start=1)
    ]


_PAINTERS: dict[int, type[painter.Painter]] = {1: painter.Painter, 2: class_painter.ClassPainter}
CATEGORIES = {
    1: _categories(painter.THINGS, painter.STUFF),
    2: _categories(class_painter.THINGS, class_painter.STUFF),
}


def generate_scene(
    size: int, seed: int, index: int, split: str = "train2017", version: int = VERSION
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Generates scene `index` of a split from its arguments alone.

    Returns:
        rgb uint8 [S, S, 3], ids int32 [S, S] without void, and segments_info (id, category_id, area, bbox, iscrowd).

    Raises:
        ArgumentError: an unknown split or version, a negative seed or index, or a size outside 32..2048.
    """
    _check_arguments(size, seed, version)
    if split not in SPLITS or index < 0:
        raise ArgumentError(f"split={split!r}, index={index}: one of {', '.join(SPLITS)} and an index from 0 expected")
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS[split], index]))
    scene = _PAINTERS[version](size, rng)
    rgb = scene.paint()
    category_id = {category["name"]: category["id"] for category in CATEGORIES[version]}
    ids: list[int] = []  # random and distinct, as COCO's look
    while len(ids) < len(scene.kinds):
        ids = list(dict.fromkeys([*ids, *rng.integers(1, 2**24, 8).tolist()]))[: len(scene.kinds)]
    segments_info = []
    for segment, (segment_id, kind, area) in enumerate(zip(ids, scene.kinds, scene.area), start=1):
        mask = scene.segments == segment
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, right, bottom = (int(edge) for edge in (columns[0], rows[0], columns[-1], rows[-1]))
        segments_info.append(
            {
                "id": segment_id,
                "category_id": category_id[kind],
                "area": area,
                "bbox": [left, top, right - left + 1, bottom - top + 1],
                "iscrowd": 0,
            }
        )
    return rgb, np.array([0, *ids], np.int32)[scene.segments], segments_info


def write_scenes(
    out: str | os.PathLike,
    images: int,
    size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    val_images: int | None = None,
    version: int = VERSION,
) -> Path:
    """Writes `images` training and max(images // 10, 8) validation scenes under `out`, and returns `out` as a Path.

    The folder appears complete or not at all. Where it already holds the same scenes nothing is done. Pictures are PNG:
    lossless, so that pixels do not hang on a JPEG library's version and thin objects keep their edges at 64x64.
    `workers` processes (default: one per core) share the work; the bytes do not depend on their number. `val_images` is
    another number of validation scenes; a scene is the same in folders of any numbers. `version`: a key of CATEGORIES.

    Raises:
        ArgumentError: a number of images, a size or a seed that is out of range, or an unknown version.
        FileExistsError: `out` holds anything else.
    """
    out = Path(out)
    for name, count in (("images", images), ("val_images", 1 if val_images is None else val_images)):
        if count < 1:
            raise ArgumentError(f"{name}={count}: at least 1 expected")
    _check_arguments(size, seed, version)
    record = {"images": images, "size": size, "seed": seed, "version": version}
    record |= {} if val_images is None else {"val_images": val_images}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _read_record(out) == record:
            return out
        raise FileExistsError(f"{out} exists and does not hold the scenes {record}: choose another folder or delete it")

    with replacing_folder(out) as unfinished:
        for split, count in (("train2017", images), ("val2017", val_images or max(images // 10, 8))):
            _write_split(unfinished, split, count, size, seed, version, workers or os.cpu_count() or 1)
        (unfinished / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return out


def _check_arguments(size: int, seed: int, version: int) -> None:
    if version not in _PAINTERS:
        raise ArgumentError(f"version={version}: one of {', '.join(map(str, _PAINTERS))} expected")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ArgumentError(f"size={size}: {SIZES[0]} to {SIZES[1]} expected")
    if seed < 0:
        raise ArgumentError(f"seed={seed}: must not be negative")


def _read_record(out: Path) -> dict | None:
    try:
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _write_split(root: Path, split: str, count: int, size: int, seed: int, version: int, workers: int) -> None:
    for folder in (root / split, root / f"panoptic_{split}", root / "annotations"):
        folder.mkdir(exist_ok=True)
    write = partial(_write_scene, root, split, size, seed, version)
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
        "info": {"description": f"generated scenes, size {size}, seed {seed}, version {version}"},
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES[version],
    }
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(contents) + "\n", encoding="utf-8")


def _write_scene(root: Path, split: str, size: int, seed: int, version: int, index: int) -> dict:
    """Writes both PNGs of one scene and returns its COCO annotation.

    Image ids differ between the splits, as in COCO.
    """
    rgb, ids, segments_info = generate_scene(size, seed, index, split, version)
    image_id = SPLITS[split] * 10_000_000 + index + 1
    name = f"{image_id:012d}.png"
    Image.fromarray(rgb).save(root / split / name, compress_level=1)
    write_panoptic_png(root / f"panoptic_{split}" / name, ids)
    return {"image_id": image_id, "file_name": name, "segments_info": segments_info}
