"""Makes the page of errors for result files: `ldmseg pq GT_JSON PRED_JSON --page FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast.data.folders import read_image
from ldmseg_fast.errors import DataError
from ldmseg_fast.metrics.pq_files import FilePair
from ldmseg_fast.panoptic.splits import picture_folder
from ldmseg_fast.reports.error_entry import PageEntry
from ldmseg_fast.reports.error_page import (
    random_places,
    render_entry,
    worst_places,
    write_error_page,
    write_worst_and_random,
)


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
    pair = FilePair(gt_json, pred_json, gt_folder, pred_folder, class_agnostic, allow_missing=True)
    reader = _Files(pair, images)
    lowest = worst_places({place: row["pq"] for place, row in enumerate(scores) if row["pq"] is not None}, worst)
    chosen = random_places(len(scores), random, seed)
    drawn = {place: render_entry(reader.entry(place)) for place in {*lowest, *chosen}}
    title = f"{Path(pred_json).name} against {Path(gt_json).name}"
    write_worst_and_random(path, drawn, lowest, chosen, title, len(scores), by_category=not class_agnostic)


def write_page_of_changes(
    path: str | Path,
    comparison: Mapping[str, Any],
    before: FilePair,
    after: FilePair,
    images: str | Path | None = None,
    *,
    most: int = 8,
) -> None:
    """Writes the images in which two methods differ most as an HTML page: those that gained and those that lost.

    Args:
        path: the HTML file.
        comparison: what `metrics.resampling.compare` returned for the two.
        before, after: the files of both, on one ground truth.
        images: folder of pictures, see `write_page_of_files`.
        most: images of each kind.

    Raises:
        DataError: no such folder of pictures, or one in it that cannot be read.
    """
    places = {image_id: place for place, image_id in enumerate(before.gt.image_ids)}
    readers = {Path(pair.pred.path).name: _Files(pair, images) for pair in (before, after)}
    if len(readers) == 1:
        readers = {str(pair.pred.path): _Files(pair, images) for pair in (before, after)}
    sections = {}
    for heading, sign in (("gained", 1), ("lost", -1)):
        rows = [row for row in comparison["changed"] if row["difference"] * sign > 0][:most]
        entries = [
            render_entry(reader.entry(places[row["image_id"]], f" · {name}"))
            for row in rows
            for name, reader in readers.items()
        ]
        if entries:
            sections[f"The {len(rows)} images that {heading} most"] = entries
    low, high = (100 * value for value in comparison["interval"] or (0, 0))
    first, second = (100 * value for value in comparison["pq"])
    note = (
        f"{before.pred.path}: PQ {first:.1f}. {after.pred.path}: PQ {second:.1f}. Difference "
        f"{second - first:+.1f}, 95 % interval {low:+.1f} .. {high:+.1f}, p = {comparison['p_value']:.3g}. "
        "Each image is shown with the first method and then with the second. An image's PQ is over its segments of all "
        "categories."
    )
    write_error_page(path, sections, f"{after.pred.path.name} against {before.pred.path.name}", note)


class _Files:
    """Reads the images of result files one at a time."""

    def __init__(self, pair: FilePair, images: str | Path | None) -> None:
        self.pair = pair
        self.folder = picture_folder(pair.gt.path) if images is None else Path(images)
        if images is not None and not Path(images).is_dir():
            raise DataError(f"--images {images}: no such folder")
        self.names = pair.gt.pictures()
        self.categories = {c["id"]: str(c.get("name", c["id"])) for c in pair.gt.categories}

    def entry(self, place: int, addition: str = "") -> PageEntry:
        maps = self.pair.maps(place)
        image_id = self.pair.gt.image_ids[place]
        name = self.names.get(image_id)
        picture = self.folder / name if self.folder and isinstance(name, str) else None
        return PageEntry(
            name=str(name or image_id) + addition,
            image=read_image(picture) if picture and picture.is_file() else None,
            gt_ids=maps.gt_ids,
            gt_segments=maps.gt_segments,
            pred_ids=maps.pred_ids,
            pred_segments=maps.pred_segments,
            matches=maps.matches,
            categories={} if self.pair.class_agnostic else self.categories,
        )
