"""Panoptic quality of COCO panoptic files: reads pairs of PNGs on a few threads and keeps only their matches."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.metrics.matching import match_runs, match_segments, segment_table
from ldmseg_fast.metrics.pq import PQStat
from ldmseg_fast.metrics.pq_report import bootstrap_interval, image_qualities
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic_format import (
    PanopticFormatError,
    load_panoptic_json,
    read_panoptic_png,
    read_panoptic_runs,
)

MAX_THREADS = 8


def evaluate_files(
    gt_json: str | Path,
    pred_json: str | Path,
    gt_folder: str | Path | None = None,
    pred_folder: str | Path | None = None,
    class_agnostic: bool = False,
    allow_missing: bool = False,
    num_threads: int | None = None,
    boundary: bool = False,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """panopticapi's evaluation: `PQStat.result()` (fractions) and what only files can tell.

    Folders of PNGs default to the JSON's path without ".json", then to ROOT/NAME for ROOT/annotations/NAME.json.
    Added keys: `seconds` (reading + matching), `threads`, `missing` and `ignored` (image ids without a prediction, and
    predicted but not in the ground truth), `interval` (bootstrap 95 % of PQ over images), `per_image` (in the order of
    the ground truth) and `worst_images`. `boundary` adds boundary PQ (see `PQStat.result`).
    Raises `PanopticFormatError` naming the file: see `load_panoptic_json`, `read_panoptic_png`, `match_segments`;
    images without prediction unless `allow_missing`, which counts them as predicted all void; no folder of PNGs.
    """
    started = time.perf_counter()
    gt = load_panoptic_json(gt_json)
    predicted = {entry["image_id"]: entry for entry in load_panoptic_json(pred_json, predictions=True)["annotations"]}
    missing = [entry["image_id"] for entry in gt["annotations"] if entry["image_id"] not in predicted]
    if missing and not allow_missing:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise PanopticFormatError(
            f"{pred_json}: no prediction for {len(missing)} of {len(gt['annotations'])} images of {gt_json}: {listed}; "
            "predict them, or count them as empty with --allow-missing"
        )
    gt_root = png_folder(gt_json, gt_folder)
    pred_root = png_folder(pred_json, pred_folder) if len(missing) < len(gt["annotations"]) else Path()
    stat = PQStat(gt["categories"], class_agnostic, boundary)

    def match(entry: dict[str, Any]) -> np.ndarray:
        prediction = predicted.get(entry["image_id"])
        gt_path, pred_path = gt_root / entry["file_name"], None
        gt_table = segment_table(entry["segments_info"], class_agnostic, use_area=True)
        pred_table = segment_table(prediction["segments_info"] if prediction else [], class_agnostic)
        if prediction is not None:
            pred_path = pred_root / prediction["file_name"]
        try:
            stat.check_categories(pred_table, "prediction")
            return _match_files(gt_path, gt_table, pred_path, pred_table, boundary)
        except PanopticFormatError as error:
            files = ", ".join(str(path) for path in (gt_path, pred_path) if path is not None)
            raise PanopticFormatError(f"image {entry['image_id']} ({files}): {error}") from None

    threads = num_threads or default_threads()
    for entry, matches in zip(gt["annotations"], _map_in_order(match, gt["annotations"], threads)):
        stat.add_matches(entry["image_id"], matches)
    seconds = time.perf_counter() - started
    result = stat.result()
    per_image = image_qualities(stat)
    scored = [image for image in per_image if image["pq"] is not None]
    return result | {
        "seconds": seconds,
        "threads": threads,
        "missing": missing,
        "ignored": sorted(predicted.keys() - {entry["image_id"] for entry in gt["annotations"]}, key=str),
        "interval": bootstrap_interval(stat, replicates, seed),
        "worst_images": sorted(scored, key=lambda image: (image["pq"], str(image["image_id"])))[:10],
        "per_image": per_image,
    }


def png_folder(json_path: str | Path, given: str | Path | None = None) -> Path:
    """Where the PNGs of a panoptic JSON lie; `PanopticFormatError` naming the places looked at where there is none."""
    path = Path(json_path)
    places = [path.with_suffix(""), path.parent.parent / path.stem] if given is None else [Path(given)]
    for place in places:
        if place.is_dir():
            return place
    tried = ", ".join(map(str, places))
    raise PanopticFormatError(f"{json_path}: no folder of PNGs at {tried}; name it with --gt-folder or --pred-folder")


def default_threads() -> int:
    """One per core this process may use, at most `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def _match_files(
    gt_path: Path, gt_table: np.ndarray, pred_path: Path | None, pred_table: np.ndarray, boundary: bool
) -> np.ndarray:
    """One pair of PNGs; without `pred_path` the prediction is all void."""
    if _C is not None and pred_path is not None:
        gt, pred = _read(read_panoptic_runs, gt_path), _read(read_panoptic_runs, pred_path)
        if isinstance(gt, _C.RunMap) and isinstance(pred, _C.RunMap):
            with suppress(_C.Inconsistent):  # below, the maps are read whole to say what is wrong
                return match_runs(gt, gt_table, pred, pred_table, boundary)
    gt_ids = _read(read_panoptic_png, gt_path)
    pred_ids = np.zeros_like(gt_ids) if pred_path is None else _read(read_panoptic_png, pred_path)
    return match_segments(gt_ids, gt_table, pred_ids, pred_table, boundary)


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise PanopticFormatError(f"{path}: the JSON lists this PNG but there is no such file") from None


def _map_in_order(function: Any, entries: list[dict[str, Any]], threads: int) -> Iterable[np.ndarray]:
    """`map` over a few threads; the first error cancels what has not begun."""
    if threads == 1:
        yield from map(function, entries)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(function, entries)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
