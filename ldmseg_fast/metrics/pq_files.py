"""Measures panoptic quality of files, as panopticapi does: PNGs, RLE or polygons, on either side.

A few threads read pairs of maps and keep only their matches.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.metrics.file_pair import FilePair, why_missing
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.metrics.pq_report import image_qualities
from ldmseg_fast.metrics.resampling import bootstrap_interval, check_draws
from ldmseg_fast.metrics.slices import slices_of
from ldmseg_fast.metrics.sources import png_folder
from ldmseg_fast.threads import cores, startable_threads

__all__ = ["FilePair", "evaluate_files", "png_folder", "why_missing"]

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
    by: str | None = None,
    table: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluates result files as panopticapi does.

    Args:
        gt_json, pred_json: each a COCO panoptic JSON with PNGs, COCO instances or results with RLE or polygons, or,
            class-agnostic, a folder of PNGs; the content tells which. `metrics.mask_maps` has the rule of overlaps.
        gt_folder, pred_folder: of PNGs; by default the JSON's path without ".json", then ROOT/NAME for
            ROOT/annotations/NAME.json.
        allow_missing: counts images without prediction as predicted all void.
        boundary: adds boundary PQ.
        by, table: a column of images, of `table` (CSV) or of the ground truth's `images`; adds `slices`.

    Returns:
        `PanopticQuality.compute()` (fractions) and what only files can tell: `seconds` (reading and matching),
        `threads`, `missing` and `ignored` (image ids without a prediction, and predicted but not in the ground truth),
        `interval` (bootstrap 95 % of PQ over images), `per_image` (in the order of the ground truth), `worst_images`,
        and `overlaps` where masks hid each other.

    Raises:
        PanopticFormatError: names the file. See `open_source`, `read_panoptic_png` and `match_segments`; besides,
            images without prediction unless `allow_missing`, predictions of other images alone, and a missing folder of
            PNGs.
        ArgumentError: replicates or a seed below 0, a table without `by`.
    """
    check_draws(replicates, seed)
    if table is not None and by is None:
        raise ArgumentError(f"table={table}: needs `by`, the column to take of it")
    options = (class_agnostic, allow_missing, num_threads, boundary)
    stat, facts = match_all(gt_json, pred_json, gt_folder, pred_folder, *options)
    return report_of(stat, facts, replicates, seed, by, table)


def match_all(
    gt_json: str | Path,
    pred_json: str | Path,
    gt_folder: str | Path | None = None,
    pred_folder: str | Path | None = None,
    class_agnostic: bool = False,
    allow_missing: bool = False,
    num_threads: int | None = None,
    boundary: bool = False,
) -> tuple[PanopticQuality, dict[str, Any]]:
    """Matches all images of files; see `evaluate_files`. Returns the statistic and what only files can tell."""
    started = time.perf_counter()
    wanted = num_threads or default_threads()
    pair = FilePair(gt_json, pred_json, gt_folder, pred_folder, class_agnostic, allow_missing, boundary, wanted)
    stat = PanopticQuality(pair.gt.categories, class_agnostic, boundary)
    count = len(pair.gt.image_ids)
    threads = max(1, startable_threads(min(wanted, count, MOST_THREADS)))
    for image_id, matches in zip(pair.gt.image_ids, _map_in_order(pair.match, count, threads)):
        stat.add_matches(image_id, matches)
    seconds = time.perf_counter() - started
    facts = {"seconds": seconds, "threads": threads, "missing": pair.missing, "ignored": pair.ignored}
    if pair.overlaps:
        facts["overlaps"] = dict(sorted(pair.overlaps.items()))
    return stat, facts | {"pair": pair}


def report_of(
    stat: PanopticQuality,
    facts: dict[str, Any],
    replicates: int = 1000,
    seed: int = 0,
    by: str | None = None,
    table: str | Path | None = None,
) -> dict[str, Any]:
    """Makes the report of `evaluate_files` of what `match_all` returned."""
    facts = dict(facts)
    pair: FilePair = facts.pop("pair")
    result, interval = stat.compute(), bootstrap_interval(stat, replicates, seed)
    per_image = image_qualities(stat)
    scored = [image for image in per_image if image["pq"] is not None]
    report = (
        result
        | facts
        | {
            "interval": interval,
            "worst_images": sorted(scored, key=lambda image: (image["pq"], str(image["image_id"])))[:10],
            "per_image": per_image,
        }
    )
    if by is not None:
        report["slices"] = slices_of(stat, by, table, pair.gt.path)
        for image, value in zip(per_image, report["slices"].pop("values")):
            image[by] = value
    return report


def default_threads() -> int:
    """Returns one thread per core that this process may use, at most `MAX_THREADS`."""
    return min(cores(), MAX_THREADS)


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
