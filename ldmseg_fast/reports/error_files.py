"""Makes the page of errors for result files: `ldmseg pq GT_JSON PRED_JSON --page FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.data.folders import find_split, read_image
from ldmseg_fast.errors import DataError
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.metrics.pq_files import png_folder
from ldmseg_fast.panoptic.format import load_panoptic_json, read_panoptic_png
from ldmseg_fast.reports.error_entry import PageEntry
from ldmseg_fast.reports.error_page import random_places, render_entry, worst_places, write_worst_and_random


def write_page_of_files(
    path: str | Path,
    scores: Sequence[Mapping[str, Any]],
    gt_json: str | Path,
    pred_json: str | Path,
    gt_folder: str | Path | None = None,
    pred_folder: str | Path | None = None,
    images: str | Path | None = None,
    *,
    class_agnostic: bool = False,
    worst: int = 8,
    random: int = 8,
    seed: int = 0,
) -> None:
    """Writes the worst and some random images of COCO panoptic result files as an HTML page.

    Args:
        path: the HTML file.
        scores: `per_image` of `evaluate_files`, of the same files.
        gt_json, pred_json, gt_folder, pred_folder, class_agnostic: see `evaluate_files`.
        images: folder of pictures, each under its `file_name`; by default the split's own. Grey where there are none.
        worst, random: how many images; the random ones depend on `seed`.

    Raises:
        DataError: no such folder of pictures, or one in it that cannot be read.
    """
    reader = _Files(gt_json, pred_json, gt_folder, pred_folder, images, class_agnostic)
    lowest = worst_places({place: row["pq"] for place, row in enumerate(scores) if row["pq"] is not None}, worst)
    chosen = random_places(len(scores), random, seed)
    drawn = {place: render_entry(reader.entry(place)) for place in {*lowest, *chosen}}
    title = f"{Path(pred_json).name} against {Path(gt_json).name}"
    write_worst_and_random(path, drawn, lowest, chosen, title, len(scores), by_category=not class_agnostic)


class _Files:
    """Reads the images of result files one at a time."""

    def __init__(
        self,
        gt_json: str | Path,
        pred_json: str | Path,
        gt_folder: str | Path | None,
        pred_folder: str | Path | None,
        images: str | Path | None,
        class_agnostic: bool,
    ) -> None:
        self.gt = load_panoptic_json(gt_json)
        predictions = load_panoptic_json(pred_json, predictions=True)["annotations"]
        self.predicted = {entry["image_id"]: entry for entry in predictions}
        self.gt_root = png_folder(gt_json, gt_folder)
        self.pred_root = png_folder(pred_json, pred_folder) if self.predicted else Path()
        self.class_agnostic = class_agnostic
        self.pictures = picture_folder(Path(gt_json)) if images is None else Path(images)
        if images is not None and not Path(images).is_dir():
            raise DataError(f"--images {images}: no such folder")
        self.names = {image["id"]: image.get("file_name") for image in self.gt["images"]}
        self.categories = {c["id"]: str(c.get("name", c["id"])) for c in self.gt["categories"]}

    def entry(self, place: int) -> PageEntry:
        truth = self.gt["annotations"][place]
        gt_ids = read_panoptic_png(self.gt_root / truth["file_name"])
        prediction: dict[str, Any] | None = self.predicted.get(truth["image_id"])
        pred_ids = read_panoptic_png(self.pred_root / prediction["file_name"]) if prediction else np.zeros_like(gt_ids)
        pred_segments = prediction["segments_info"] if prediction else []
        stat = PanopticQuality(self.gt["categories"], self.class_agnostic)
        matches = stat.add(gt_ids, truth["segments_info"], pred_ids, pred_segments, truth["image_id"], use_gt_area=True)
        name = self.names[truth["image_id"]]
        picture = self.pictures / name if self.pictures and isinstance(name, str) else None
        return PageEntry(
            name=str(name or truth["image_id"]),
            image=read_image(picture) if picture and picture.is_file() else None,
            gt_ids=gt_ids,
            gt_segments=truth["segments_info"],
            pred_ids=pred_ids,
            pred_segments=pred_segments,
            matches=matches,
            categories={} if self.class_agnostic else self.categories,
        )


def picture_folder(gt_json: Path) -> Path | None:
    """Finds the pictures of ROOT/annotations/panoptic_SPLIT.json; None where they are not there."""
    try:
        return find_split(gt_json.parent.parent, gt_json.stem.removeprefix("panoptic_")).images
    except DataError:
        return None
