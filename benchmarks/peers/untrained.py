"""Makes rows of panoptic quality of what no network is trained for: classical methods and trivial baselines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.evaluation.semantic import SemanticIoU
from ldmseg_fast.metrics import classical
from ldmseg_fast.metrics.baselines import BASELINES
from ldmseg_fast.metrics.nearest_category import NearestCategory
from ldmseg_fast.metrics.pq import PanopticQuality

Row = dict[str, Any]
QUALITIES = ("sq", "rq", "boundary_pq")


@dataclass(frozen=True)
class Tuned:
    """Holds a classical method at its best setting on the first images of a training split."""

    method: classical.Classical
    tuned_on: str
    quality: float  # PQ there, in percent

    @classmethod
    def on(cls, data: str, split: str, images: int, method: str) -> Tuned:
        """Tunes on every map of the first `images` pictures."""
        training = CocoPanoptic(data, split, 64)
        pictures = list(dict.fromkeys(training.paths(index)[0] for index in range(len(training))))[:images]
        last = max(index for index in range(len(training)) if training.paths(index)[0] in set(pictures))
        items = classical.load_items(CocoPanoptic(data, split, 64, limit=last + 1))
        chosen = [item for index, item in enumerate(items) if training.paths(index)[0] in set(pictures)]
        best, quality = classical.tune(method, chosen)
        return cls(best, f"{split}, {len(chosen)} maps of {len(pictures)} pictures, PQ {quality:.2f}", quality)


def classical_rows(tuned: Tuned, data: str, split: str, limit: int) -> list[Row]:
    """Returns the row of a classical method on a split."""
    items = list(classical.load_items(CocoPanoptic(data, split, 64, limit=limit)))
    start = time.perf_counter()
    result = classical.score(tuned.method, items, boundary=True).compute()
    seconds = time.perf_counter() - start
    values = result["class_agnostic"]
    pictures = len({id(image) for image, _ in items})
    return [
        {
            "variant": tuned.method.method,
            "case": {"data": Path(data).name, "split": split, "images": len(items), "mode": "class-agnostic"},
            "value": 100 * values["pq"],
            **{key: 100 * values[key] for key in QUALITIES},
            "pq_crowd_correct": 100 * result["pq_crowd_correct"],
            **{key: values[key] for key in ("tp", "fp", "fn")},
            "setting": str(tuned.method),
            "tuned_on": tuned.tuned_on,
            "ms_per_image": 1000 * seconds / pictures,
        }
    ]


def named_rows(tuned: Tuned, data: str, train_split: str, split: str, limit: int) -> list[Row]:
    """Returns the row of a classical method whose segments are named by their nearest neighbours in a training split.

    Both splits must have categories; every image of the training split is looked at.
    """
    training, test = CocoPanoptic(data, train_split, 64), CocoPanoptic(data, split, 64, limit=limit)
    nearest = NearestCategory(classical.load_items(training), training.categories)
    quality, iou = PanopticQuality(test.categories, boundary=True), SemanticIoU(test.categories)
    for index, (image, truth) in enumerate(classical.load_items(test)):
        found = nearest.name(image, tuned.method(image))
        quality.add(*truth, *found, image_id=index)
        iou.add(*truth, *found)
    values = quality.compute()["All"]
    return [
        {
            "variant": f"{tuned.method.method} + nearest neighbour",
            "case": {"data": Path(data).name, "split": split, "images": len(test), "mode": "class-aware"},
            "value": 100 * values["pq"],
            **{key: 100 * values[key] for key in QUALITIES},
            "miou": 100 * iou.result()["miou"],
            "setting": str(tuned.method),
            "tuned_on": f"{tuned.tuned_on}; names from {train_split}, {len(nearest.numbers)} segments",
        }
    ]


def trivial_rows(data: str, split: str, limit: int) -> list[Row]:
    """Returns the rows of what looks at no picture: one segment, halves, a grid."""
    items = list(classical.load_items(CocoPanoptic(data, split, 64, limit=limit)))
    rows = []
    for name, make in BASELINES.items():
        result = classical.score(lambda image, make=make: make(*image.shape[:2]), items, boundary=True).compute()
        values = result["class_agnostic"]
        case = {"data": Path(data).name, "split": split, "images": len(items), "mode": "class-agnostic"}
        numbers = {key: 100 * values[key] for key in QUALITIES} | {key: values[key] for key in ("tp", "fp", "fn")}
        crowds = {"pq_crowd_correct": 100 * result["pq_crowd_correct"]}
        rows.append({"variant": name, "case": case, "value": 100 * values["pq"]} | numbers | crowds)
    return rows
