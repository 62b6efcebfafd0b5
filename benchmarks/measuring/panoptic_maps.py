"""Makes panoptic maps on disk, ground truth and predictions, for the benchmarks of evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.panoptic.format import ids_to_rgb, load_panoptic_json, read_panoptic_png
from ldmseg_fast.panoptic.shapes import segment_shapes

HEIGHT, WIDTH = 480, 640
CATEGORIES = [{"id": i, "name": f"category {i}", "isthing": int(i <= 6)} for i in range(1, 11)]


class PanopticMaps:
    """Writes maps to gt/ and pred/ as PNGs, and JSONs over the first n images.

    Args:
        folder: an empty folder.
        images: maps of each kind.
        real: a COCO-panoptic folder; every second map is then one of its train2017, perturbed for the prediction.
    """

    def __init__(self, folder: Path, images: int, real: Path | None):
        self.folder, self.size = folder, images
        self.entries: dict[str, list[dict[str, Any]]] = {"gt": [], "pred": []}
        rng = np.random.default_rng(0)
        for kind in self.entries:
            (folder / kind).mkdir()
        real_maps = _real_maps(real) if real else []
        for index in range(images):
            # generated and real maps by turns, so that every part of the set has both
            use_real = real_maps and index % 2
            gt = real_maps[index // 2 % len(real_maps)]() if use_real else None
            gt, pred = _perturbed(rng, gt) if gt is not None else _generated(rng)
            for kind, ids in (("gt", gt), ("pred", pred)):
                self._write(kind, index, ids, crowds=kind == "gt")

    def _write(self, kind: str, index: int, ids: np.ndarray, crowds: bool) -> None:
        name = f"{index:06d}.png"
        Image.fromarray(ids_to_rgb(ids)).save(self.folder / kind / name)  # Pillow's defaults, as most tools write
        segments = [
            {"id": int(i), "category_id": int(i) % 10 + 1, "area": int(area), "iscrowd": int(crowds and i % 17 == 0)}
            for i, area in zip(*np.unique(ids[ids != 0], return_counts=True))
        ]
        self.entries[kind].append({"image_id": index, "file_name": name, "segments_info": segments})

    def json_of(self, count: int) -> tuple[Path, Path]:
        """Writes ground truth and prediction JSON over `count` images; beyond the maps there are, they come round
        again."""
        paths = []
        for kind, entries in self.entries.items():
            chosen = [entries[k % self.size] | {"image_id": k} for k in range(count)]
            images = [{"id": k, "file_name": f"{k}.jpg", "height": HEIGHT, "width": WIDTH} for k in range(count)]
            path = self.folder / f"{kind}_{count}.json"
            path.write_text(json.dumps({"images": images, "annotations": chosen, "categories": CATEGORIES}))
            paths.append(path)
        return paths[0], paths[1]

    def masks_of(self, count: int) -> tuple[Path, Path]:
        """Writes the same segments as COCO instances and as a list of results, with run lengths and without PNGs."""
        paths = []
        for kind, entries in self.entries.items():
            annotations = []
            for k in range(count):
                entry = entries[k % self.size]
                shapes = {
                    s["id"]: s for s in segment_shapes(read_panoptic_png(self.folder / kind / entry["file_name"]), True)
                }
                for segment in entry["segments_info"]:
                    masks = {key: shapes[segment["id"]][key] for key in ("segmentation", "bbox")}
                    more = {"id": len(annotations) + 1, "area": segment["area"], "iscrowd": segment["iscrowd"]}
                    more = more if kind == "gt" else {"score": 0.9}
                    annotations.append({"image_id": k, "category_id": segment["category_id"], **masks, **more})
            images = [{"id": k, "file_name": f"{k}.jpg", "height": HEIGHT, "width": WIDTH} for k in range(count)]
            content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
            path = self.folder / f"{kind}_masks_{count}.json"
            path.write_text(json.dumps(content if kind == "gt" else annotations))
            paths.append(path)
        return paths[0], paths[1]

    def loaded(self, index: int) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray, list[dict[str, Any]]]:
        """Returns ids (uint32 [H, W]) and segments of the ground truth, then of the prediction."""
        gt, pred = self.entries["gt"][index], self.entries["pred"][index]
        gt_ids, pred_ids = (read_panoptic_png(self.folder / kind / gt["file_name"]) for kind in ("gt", "pred"))
        return gt_ids, gt["segments_info"], pred_ids, pred["segments_info"]


def _generated(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Curved Voronoi cells; the prediction has moved, missing and split ones."""
    count = int(rng.integers(6, 40))
    seeds = rng.random((count, 2)) * (HEIGHT, WIDTH)
    wobble = np.kron(rng.normal(0, 12, (2, 12, 16)), np.ones((40, 40)))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    y, x = (axis + np.roll(noise, 20) for axis, noise in zip((y, x), wobble))
    ids = np.concatenate([[0], rng.choice(2**24 - 1, count, replace=False) + 1])
    gt = _nearest(y, x, seeds)
    moved = seeds + rng.normal(0, 6, seeds.shape)
    moved[rng.random(count) < 0.15] = -1e6
    pred = _nearest(y, x, moved)
    return ids[np.where(rng.random(count + 1)[gt] < 0.08, 0, gt)], ids[pred]


def _nearest(y: np.ndarray, x: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """1 + the index of the nearest seed, [H, W]."""
    best, nearest = np.full(y.shape, np.inf, np.float32), np.zeros(y.shape, np.int64)
    for index, (seed_y, seed_x) in enumerate(seeds, 1):
        distance = ((y - seed_y) ** 2 + (x - seed_x) ** 2).astype(np.float32)
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], index
    return nearest


def _real_maps(root: Path) -> list[Callable[[], np.ndarray]]:
    content = load_panoptic_json(root / "annotations" / "panoptic_train2017.json")
    folder = root / "panoptic_train2017"
    return [lambda name=entry["file_name"]: read_panoptic_png(folder / name) for entry in content["annotations"]]


def _perturbed(rng: np.random.Generator, gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A prediction for a real map: everything a few pixels off, some segments missing."""
    pred = np.roll(gt, tuple(rng.integers(-5, 6, 2)), (0, 1))
    missing = rng.random(len(np.unique(pred))) < 0.15
    return gt, np.where(np.isin(pred, np.unique(pred)[missing]), 0, pred)
