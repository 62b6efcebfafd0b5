"""Measures panoptic quality of COCO panoptic files, as panopticapi does.

A few threads read pairs of PNGs and keep only their matches.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.metrics.matching import match_segments
from ldmseg_fast.metrics.pq import OBJECT_CATEGORY, PQStat
from ldmseg_fast.metrics.pq_report import bootstrap_interval, image_qualities
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS, read_panoptic_png

MAX_THREADS = 8
_TASK = 16  # most images that a thread takes at a time


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
    """Evaluates result files as panopticapi does.

    Folders of PNGs default to the JSON's path without ".json", then to ROOT/NAME for ROOT/annotations/NAME.json.
    `allow_missing` counts images without prediction as predicted all void. `boundary` adds boundary PQ.

    Returns:
        `PQStat.result()` (fractions) and what only files can tell: `seconds` (reading and matching), `threads`,
        `missing`
        and `ignored` (image ids without a prediction, and predicted but not in the ground truth), `interval` (bootstrap
        95 % of PQ over images), `per_image` (in the order of the ground truth) and `worst_images`.

    Raises:
        PanopticFormatError: names the file. See `load_panoptic_json`, `read_panoptic_png` and `match_segments`;
            besides, images without prediction unless `allow_missing`, and a missing folder of PNGs.
    """
    started = time.perf_counter()
    gt, pred = index_annotations(gt_json), index_annotations(pred_json, predictions=True)
    predicted = {image_id: k for k, image_id in enumerate(pred.image_ids)}
    missing = [image_id for image_id in gt.image_ids if image_id not in predicted]
    if missing and not allow_missing:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise PanopticFormatError(
            f"{pred_json}: no prediction for {len(missing)} of {len(gt.image_ids)} images of {gt_json}: {listed}; "
            "predict them, or count them as empty with --allow-missing"
        )
    gt_root = png_folder(gt_json, gt_folder)
    pred_root = png_folder(pred_json, pred_folder) if len(missing) < len(gt.image_ids) else Path()
    stat = PQStat(gt.categories, class_agnostic, boundary)
    foreign = not class_agnostic and not pred.used_categories <= stat.categories.keys()

    def match(k: int) -> np.ndarray:
        gt_name, gt_table = gt.annotation(k)
        gt_path, pred_path, pred_table = gt_root / gt_name, None, np.empty((0, 4), np.int64)
        if (other := predicted.get(gt.image_ids[k])) is not None:
            pred_name, pred_table = pred.annotation(other)
            pred_path = pred_root / pred_name
        if class_agnostic:
            gt_table[:, 1] = pred_table[:, 1] = OBJECT_CATEGORY["id"]
        try:
            if foreign:
                stat.check_categories(pred_table, "prediction")
            return _match_files(gt_path, gt_table, pred_path, pred_table, boundary)
        except PanopticFormatError as error:
            files = ", ".join(str(path) for path in (gt_path, pred_path) if path is not None)
            raise PanopticFormatError(f"image {gt.image_ids[k]} ({files}): {error}") from None

    threads = num_threads or default_threads()
    for image_id, matches in zip(gt.image_ids, _map_in_order(match, len(gt.image_ids), threads)):
        stat.add_matches(image_id, matches)
    seconds = time.perf_counter() - started
    result, interval = stat.result(), bootstrap_interval(stat, replicates, seed)
    per_image = image_qualities(stat)
    scored = [image for image in per_image if image["pq"] is not None]
    return result | {
        "seconds": seconds,
        "threads": threads,
        "missing": missing,
        "ignored": sorted(predicted.keys() - set(gt.image_ids), key=str),
        "interval": interval,
        "worst_images": sorted(scored, key=lambda image: (image["pq"], str(image["image_id"])))[:10],
        "per_image": per_image,
    }


def png_folder(json_path: str | Path, given: str | Path | None = None) -> Path:
    """Finds the folder with the PNGs of a panoptic JSON.

    Raises:
        PanopticFormatError: there is none; the message names the places looked at.
    """
    path = Path(json_path)
    places = [path.with_suffix(""), path.parent.parent / path.stem] if given is None else [Path(given)]
    for place in places:
        if place.is_dir():
            return place
    tried = ", ".join(map(str, places))
    raise PanopticFormatError(f"{json_path}: no folder of PNGs at {tried}; name it with --gt-folder or --pred-folder")


def default_threads() -> int:
    """Returns one thread per core that this process may use, at most `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def _match_files(
    gt_path: Path, gt_table: np.ndarray, pred_path: Path | None, pred_table: np.ndarray, boundary: bool
) -> np.ndarray:
    """Matches one pair of PNGs; without `pred_path` the prediction is all void."""
    if _C is not None and pred_path is not None and gt_path.is_file() and pred_path.is_file():
        with suppress(ValueError):  # rare or wrong: the functions below read it whole and say what is wrong
            paths = os.fsencode(gt_path), os.fsencode(pred_path)
            return _C.match_files(paths[0], gt_table, paths[1], pred_table, boundary, MAX_PIXELS)
    gt_ids = _read(gt_path)
    pred_ids = np.zeros_like(gt_ids) if pred_path is None else _read(pred_path)
    return match_segments(gt_ids, gt_table, pred_ids, pred_table, boundary)


def _read(path: Path) -> np.ndarray:
    try:
        return read_panoptic_png(path)
    except FileNotFoundError:
        raise PanopticFormatError(f"{path}: the JSON lists this PNG but there is no such file") from None


def _map_in_order(function: Callable[[int], np.ndarray], count: int, threads: int) -> Iterator[np.ndarray]:
    """Yields function(0), function(1), ... over a few threads, a few tasks ahead; the first error cancels the rest."""
    if threads == 1:
        yield from map(function, range(count))
        return
    step = max(1, min(_TASK, count // (4 * threads)))
    waiting: deque[Future[list[np.ndarray]]] = deque()

    def several(first: int) -> list[np.ndarray]:
        return [function(k) for k in range(first, min(first + step, count))]

    with ThreadPoolExecutor(threads) as pool:
        try:
            for first in range(0, count, step):
                waiting.append(pool.submit(several, first))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
