"""Measures panoptic quality of COCO panoptic files, as panopticapi does.

A few threads read pairs of PNGs and keep only their matches.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.metrics.matching import boundary_distance, match_segments
from ldmseg_fast.metrics.pq import OBJECT_CATEGORY, PanopticQuality
from ldmseg_fast.metrics.pq_report import bootstrap_interval, image_qualities
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS, read_panoptic_png, read_run_map
from ldmseg_fast.panoptic.near_files import NearFiles, is_file
from ldmseg_fast.threads import cores, startable_threads

MAX_THREADS = 8  # unless more are asked for
MOST_THREADS = 256
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
        `PanopticQuality.compute()` (fractions) and what only files can tell: `seconds` (reading and matching), `threads`,
        `missing` and `ignored` (image ids without a prediction, and predicted but not in the ground truth), `interval`
        (bootstrap 95 % of PQ over images), `per_image` (in the order of the ground truth) and `worst_images`.

    Raises:
        PanopticFormatError: names the file. See `load_panoptic_json`, `read_panoptic_png` and `match_segments`;
            besides, images without prediction unless `allow_missing`, predictions of other images alone, and a missing
            folder of PNGs.
    """
    started = time.perf_counter()
    gt, pred = index_annotations(gt_json), index_annotations(pred_json, predictions=True)
    predicted = {image_id: k for k, image_id in enumerate(pred.image_ids)}
    missing = [image_id for image_id in gt.image_ids if image_id not in predicted]
    reason = why_missing(gt.image_ids, missing, pred.image_ids) if missing else ""
    if missing and (reason or not allow_missing):
        cure = reason or "predict them, or count them as empty with --allow-missing"
        raise PanopticFormatError(
            f"{pred_json}: no prediction for {len(missing)} of {len(gt.image_ids)} images of {gt_json}: "
            f"{_some(missing)}; {cure}"
        )
    gt_root = png_folder(gt_json, gt_folder)
    pred_root = png_folder(pred_json, pred_folder) if len(missing) < len(gt.image_ids) else Path()
    stat = PanopticQuality(gt.categories, class_agnostic, boundary)
    foreign = not class_agnostic and not pred.used_categories <= stat.categories.keys()

    def match(k: int) -> np.ndarray:
        gt_name, gt_table = gt.annotation(k)
        gt_path, pred_name, pred_path, pred_table = gt_root / gt_name, "", None, np.empty((0, 4), np.int64)
        if (other := predicted.get(gt.image_ids[k])) is not None:
            pred_name, pred_table = pred.annotation(other)
            pred_path = pred_root / pred_name
        if class_agnostic:
            gt_table[:, 1] = pred_table[:, 1] = OBJECT_CATEGORY["id"]
        try:
            if foreign:
                stat.check_categories(pred_table, "prediction")
            return _match_files(gt_path, gt_table, pred_path, pred_table, boundary)
        except OSError:
            places = ((gt_root, gt_name), (pred_root, pred_name))
            lost = [(root, name) for root, name in places if name and not is_file(root / name)]
            if not lost:
                raise
            root, name = lost[0]
            near = NearFiles(root).nearest(name) or "fetch or predict it again"
            raise PanopticFormatError(
                f"image {gt.image_ids[k]}: {root / name}: the JSON lists this PNG but there is no such file; {near}"
            ) from None
        except PanopticFormatError as error:
            files = ", ".join(str(path) for path in (gt_path, pred_path) if path is not None)
            raise PanopticFormatError(f"image {gt.image_ids[k]} ({files}): {error}") from None

    threads = max(1, startable_threads(min(num_threads or default_threads(), len(gt.image_ids), MOST_THREADS)))
    for image_id, matches in zip(gt.image_ids, _map_in_order(match, len(gt.image_ids), threads)):
        stat.add_matches(image_id, matches)
    seconds = time.perf_counter() - started
    result, interval = stat.compute(), bootstrap_interval(stat, replicates, seed)
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
    return min(cores(), MAX_THREADS)


def why_missing(truth: Sequence[int | str], missing: Sequence[int | str], predicted: Sequence[int | str]) -> str:
    """Tells why predictions miss images: their ids are written in another way, or are those of other images.

    Args:
        truth: image ids of the ground truth.
        missing: those without prediction.
        predicted: image ids of the predictions.

    Returns:
        The reason and the cure; "" where there is no such reason.
    """
    listed, ours = set(truth), {_spelling(image_id): image_id for image_id in missing}
    foreign = [image_id for image_id in predicted if image_id not in listed]
    for image_id in foreign:
        if (twin := ours.get(_spelling(image_id))) is not None:
            kinds = ["text" if isinstance(each, str) else "number" for each in (image_id, twin)]
            return (
                f"there it is the {kinds[0]} {image_id!r}, in the ground truth the {kinds[1]} {twin!r}: "
                "write `image_id` as the ground truth does"
            )
    if foreign and len(foreign) == len(predicted):
        return f"it has none of the ground truth's, but {_some(foreign)}: is it of another split?"
    return ""


_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def _spelling(image_id: int | str) -> str:
    """Spells alike what names one image: 1, "1", "000001" and "000001.jpg"."""
    path = PurePosixPath(str(image_id))
    name = path.stem if path.suffix.lower() in _PICTURES else path.name
    return str(int(name)) if name.isascii() and name.isdigit() and len(name) < 20 else name


def _some(image_ids: Sequence[int | str], named: int = 20) -> str:
    return ", ".join(map(str, image_ids[:named])) + (", ..." if len(image_ids) > named else "")


def _match_files(
    gt_path: Path, gt_table: np.ndarray, pred_path: Path | None, pred_table: np.ndarray, boundary: bool
) -> np.ndarray:
    """Matches one pair of PNGs; without `pred_path` the prediction is all void."""
    if _C is None:
        gt_ids = read_panoptic_png(gt_path)
        pred_ids = np.zeros_like(gt_ids) if pred_path is None else read_panoptic_png(pred_path)
        return match_segments(gt_ids, gt_table, pred_ids, pred_table, boundary)
    try:
        if pred_path is not None:
            with suppress(_C.UnreadablePng):  # rare or wrong: the reader below says what is wrong
                paths = os.fsencode(gt_path), os.fsencode(pred_path)
                return _C.match_files(paths[0], gt_table, paths[1], pred_table, boundary, MAX_PIXELS)
        gt = read_run_map(gt_path)
        pred = _C.RunMap(np.zeros(gt.shape, np.int32)) if pred_path is None else read_run_map(pred_path)
        distance = boundary_distance(*gt.shape) if boundary else 0
        return _C.match_segments(gt, gt_table, pred, pred_table, distance, _C.MOST_PAIRS)
    except _C.Inconsistent as error:
        raise PanopticFormatError(str(error)) from None


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
