"""Pairs the images of ground truth and predictions of any form, and matches them by panopticapi's rules."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.mask_maps import MaskMap
from ldmseg_fast.metrics.matching import boundary_distance, match_segments
from ldmseg_fast.metrics.qualities import OBJECT_CATEGORY
from ldmseg_fast.metrics.sources import Source, lost_png, on_its_side, open_source
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS, read_panoptic_png, read_run_map
from ldmseg_fast.threads import startable_threads

_SIDES = ("ground truth", "prediction")


@dataclass
class Maps:
    """Holds one image of a pair: maps int32 [H, W] and their `segments_info`, with tables as they are matched."""

    gt_ids: np.ndarray
    gt_segments: list[dict[str, Any]]
    pred_ids: np.ndarray
    pred_segments: list[dict[str, Any]]
    matches: np.ndarray


class FilePair:
    """Opens ground truth and predictions and pairs their images.

    Args: see `evaluate_files`; with `threads` over 1, both sides are opened at once.

    Attributes:
        gt, pred: the two sides.
        missing, ignored: image ids without a prediction, and predicted ones that the ground truth does not list.
        overlaps: what masks that lie over each other have lost, by name; filled by `match`.
    """

    def __init__(
        self,
        gt_json: str | Path,
        pred_json: str | Path,
        gt_folder: str | Path | None = None,
        pred_folder: str | Path | None = None,
        class_agnostic: bool = False,
        allow_missing: bool = False,
        boundary: bool = False,
        threads: int = 1,
    ) -> None:
        self.class_agnostic, self.boundary = class_agnostic, boundary
        open_gt = partial(open_source, gt_json, gt_folder, class_agnostic=class_agnostic)
        open_pred = partial(open_source, pred_json, pred_folder, predictions=True, class_agnostic=class_agnostic)
        self.gt, self.pred = _open_both(open_gt, open_pred, threads > 1 and startable_threads(1) == 1)
        predicted = self._places()
        ids, listed = self.gt.image_ids, self.pred.image_ids
        lost = [image_id for k, image_id in enumerate(ids) if predicted[k] is None]
        reason = why_missing(ids, lost, listed) if lost and not self._by_name() else ""
        if self._by_name() and len(lost) == len(ids) and listed:
            reason = f"no PNG of one side has the name of an image of the other, such as {_some(listed, 3)}"
        if lost and (reason or not (allow_missing or not self.pred.lists_images)):
            cure = reason or "predict them, or count them as empty with --allow-missing"
            raise PanopticFormatError(
                f"{pred_json}: no prediction for {len(lost)} of {len(ids)} images of {gt_json}: {_some(lost)}; {cure}"
            )
        self.predicted = predicted
        self.missing = lost if self.pred.lists_images else []
        used = {k for k in predicted if k is not None}
        self.ignored = sorted((image_id for k, image_id in enumerate(listed) if k not in used), key=str)
        listing = self.gt.categories or self.pred.categories
        self.things = {category["id"] for category in listing if category.get("isthing", 1) == 1}
        self.known = {category["id"] for category in self.gt.categories}
        self._foreign = not class_agnostic and not self.pred.used_categories <= self.known
        if not listing:
            self.things = self.gt.used_categories | self.pred.used_categories
        self._above = np.array(sorted(self.things), np.int64)
        self.overlaps: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _by_name(self) -> bool:
        return self.gt.is_folder or self.pred.is_folder

    def _places(self) -> list[int | None]:
        """Finds the prediction of each image of the ground truth: by id, of folders of PNGs by name."""
        if not self._by_name():
            places: dict[Any, int] = {image_id: k for k, image_id in enumerate(self.pred.image_ids)}
            return [places.get(image_id) for image_id in self.gt.image_ids]
        places = {}
        for k, image_id in enumerate(self.pred.image_ids):
            places.setdefault(_spelling(image_id), k)
        for k in range(len(self.pred.image_ids)):
            places.setdefault(_spelling(self.pred.name(k)), k)
        spelled = ((_spelling(self.gt.name(k)), _spelling(image_id)) for k, image_id in enumerate(self.gt.image_ids))
        return [places.get(name, places.get(image_id)) for name, image_id in spelled]

    def match(self, k: int) -> np.ndarray:
        """Matches image k of the ground truth: rows of `MATCH_DTYPE`, [M]. Any thread may call it.

        Raises:
            PanopticFormatError: names the image and the files.
        """
        if (matches := self._match_streamed(k)) is not None:
            return matches
        gt_map: Path | MaskMap | None = None
        pred_map: Path | MaskMap | None = None
        try:
            gt_map, gt_table, pred_map, pred_table = self._read(k)
            if self.class_agnostic:
                gt_table[:, 1] = pred_table[:, 1] = OBJECT_CATEGORY["id"]
            if self._foreign and (unknown := set(pred_table[:, 1].tolist()) - self.known):
                raise PanopticFormatError(f"prediction: category ids {sorted(unknown)} are not among the categories")
            if isinstance(gt_map, MaskMap) or isinstance(pred_map, MaskMap):
                return _match_columns(gt_map, gt_table, pred_map, pred_table, self.boundary)
            return _match_files(gt_map, gt_table, pred_map, pred_table, self.boundary)
        except OSError:
            lost = next(
                (text for path in (gt_map, pred_map) if isinstance(path, Path) and (text := lost_png(path))), ""
            )
            if not lost:
                raise
            raise PanopticFormatError(f"image {self.gt.image_ids[k]}: {lost}") from None
        except PanopticFormatError as error:
            files = ", ".join(
                str(each if isinstance(each, Path) else source.path)
                for each, source in ((gt_map, self.gt), (pred_map, self.pred))
                if each is not None
            )
            files = f" ({files})" if files else ""
            raise PanopticFormatError(f"image {self.gt.image_ids[k]}{files}: {error}") from None

    def _match_streamed(self, k: int) -> np.ndarray | None:
        """Matches masks on both sides without maps of them; None where that is not all there is to do."""
        gt, pred, other = self.gt.streamed, self.pred.streamed, self.predicted[k]
        if gt is None or pred is None or other is None or self.boundary or self._foreign:
            return None
        category = OBJECT_CATEGORY["id"] if self.class_agnostic else -1
        if (found := gt.match(k, pred, other, self._above, category)) is None:
            return None
        matches, hidden, gone = found
        for side, pixels, masks in zip(_SIDES, hidden, gone):
            self._add_overlaps(side, pixels, masks)
        return matches

    def _add_overlaps(self, side: str, hidden: int, gone: int) -> None:
        if not hidden:
            return
        with self._lock:
            self.overlaps[f"{side}, pixels under another mask"] += hidden
            if gone:
                self.overlaps[f"{side}, annotations without a pixel left"] += gone

    def _read(self, k: int) -> tuple[Path | MaskMap, np.ndarray, Path | MaskMap | None, np.ndarray]:
        other = self.predicted[k]
        ask = self.gt.is_masks and other is not None and self.gt.size(k) is None
        gt_map, gt_table = self.gt.read(k, self.pred.size(other) if ask and other is not None else None, self.things)
        pred_map: Path | MaskMap | None = None
        pred_table = np.empty((0, 4), np.int64)
        if other is not None:
            size = gt_map.size if isinstance(gt_map, MaskMap) else self.gt.size(k) if self.pred.is_masks else None
            pred_map, pred_table = self.pred.read(other, size, self.things)
        for side, painted in zip(_SIDES, (gt_map, pred_map)):
            if isinstance(painted, MaskMap):
                self._add_overlaps(side, painted.hidden, len(painted.gone))
        return gt_map, gt_table, pred_map, pred_table

    def maps(self, k: int) -> Maps:
        """Reads image k whole, for pictures of it.

        Raises:
            PanopticFormatError: see `match`.
        """
        gt_map, _, pred_map, _ = self._read(k)
        gt_ids = _ids(gt_map)
        pred_ids = np.zeros_like(gt_ids) if pred_map is None else _ids(pred_map)
        other = self.predicted[k]
        there = [set(np.unique(ids).tolist()) for ids in (gt_ids, pred_ids)]
        gt_segments = [segment for segment in self.gt.details(k) if segment["id"] in there[0]]
        details = self.pred.details(other) if other is not None else []
        pred_segments = [segment for segment in details if segment["id"] in there[1]]
        return Maps(gt_ids, gt_segments, pred_ids, pred_segments, self.match(k))


def _open_both(open_gt: Callable[[], Source], open_pred: Callable[[], Source], at_once: bool) -> tuple[Source, Source]:
    if not at_once:
        return open_gt(), open_pred()
    with ThreadPoolExecutor(1) as pool:
        pred = pool.submit(open_pred)
        return open_gt(), pred.result()


def _ids(stored: Path | MaskMap) -> np.ndarray:
    return stored.ids() if isinstance(stored, MaskMap) else read_panoptic_png(stored)


def _match_columns(
    gt_map: Path | MaskMap,
    gt_table: np.ndarray,
    pred_map: Path | MaskMap | None,
    pred_table: np.ndarray,
    boundary: bool,
) -> np.ndarray:
    """Matches maps of which at least one was painted; without `pred_map` the prediction is all void."""
    gt, pred = (
        stored if isinstance(stored, MaskMap) else None if stored is None else on_its_side(read_panoptic_png(stored))
        for stored in (gt_map, pred_map)
    )
    assert gt is not None
    if pred is None:
        pred = on_its_side(np.zeros(gt.size, np.int32))
    if gt.size != pred.size:
        sizes = [f"{width}x{height}" for height, width in (gt.size, pred.size)]
        raise PanopticFormatError(f"ground truth is {sizes[0]}, prediction is {sizes[1]}; sizes must be equal")
    if _C is None:
        return match_segments(gt.ids(), gt_table, pred.ids(), pred_table, boundary)
    distance = boundary_distance(*gt.size) if boundary else 0
    try:
        return _C.match_segments(gt.columns, gt_table, pred.columns, pred_table, distance, _C.MOST_PAIRS)
    except _C.Inconsistent as error:
        raise PanopticFormatError(str(error)) from None


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
