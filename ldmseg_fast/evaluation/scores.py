"""Counts results while they come in, and makes one report of the ranks' parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldmseg_fast import distributed
from ldmseg_fast.config.categories import name_of
from ldmseg_fast.evaluation.categories import CategorySource, ModelCategories
from ldmseg_fast.evaluation.semantic import SemanticIoU
from ldmseg_fast.metrics.baselines import BASELINES, fill_nearest, segments_of
from ldmseg_fast.metrics.inpainting import InpaintingStat, only_dropped
from ldmseg_fast.metrics.miou import MeanIoU
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.panoptic.results import PanopticResult

OBJECT = [{"id": 1, "name": "object", "supercategory": "object", "isthing": 1}]

QUALITIES = ("pq", "sq", "rq", "boundary_pq")

MODEL, VOID, NEAREST, PLAIN = "model", "dropped pixels void", "nearest known pixel", "without given pixels"


class SegmentationScores:
    """Counts class-agnostic panoptic quality, and on request class-aware quality, mean IoU and trivial baselines.

    Args:
        categories: where the categories of class-aware quality come from; None: it is not counted.
        mean_iou: whether results have the truth's own ids, so that mean IoU can be counted.
        baselines: whether to count the trivial predictions of `metrics.baselines`.
        boundary: whether to count boundary PQ beside PQ.
    """

    def __init__(
        self, categories: CategorySource | None, mean_iou: bool, baselines: bool, boundary: bool = False
    ) -> None:
        self.categories = categories
        self.agnostic = PanopticQuality(OBJECT, class_agnostic=True, boundary=boundary)
        self.aware = PanopticQuality(categories.dataset.categories, boundary=boundary) if categories else None
        own = isinstance(categories, ModelCategories)
        self.semantic = SemanticIoU(categories.dataset.categories) if categories and own else None
        self.mean_iou = MeanIoU() if mean_iou else None
        self.baselines = {
            name: PanopticQuality(OBJECT, class_agnostic=True, boundary=boundary)
            for name in (BASELINES if baselines else ())
        }

    def add(
        self, index: int, name: str, truth: tuple[np.ndarray, Sequence[dict[str, Any]]], result: PanopticResult
    ) -> tuple[PanopticResult, np.ndarray]:
        """Counts one image.

        Args:
            index: its place in the split.
            name: what errors call it; another for each image.
            truth: ids int32 [H, W], 0 = void, and COCO's segments_info.
            result: the map that was predicted.

        Returns:
            The result, with categories where there are any, and its rows of `MATCH_DTYPE`.

        Raises:
            DataError: categories of another size than the map.
            PanopticFormatError: a truth whose ids and segments disagree, or of another size than the result.
        """
        ids, segments = truth
        matches = self.agnostic.add(ids, segments, result.segmentation, result.segments_info, image_id=name)
        for kind, baseline in self.baselines.items():
            guess = BASELINES[kind](*ids.shape)
            baseline.add(ids, segments, guess, segments_of(guess), image_id=name)
        if self.mean_iou is not None:
            self.mean_iou.add(without_crowds(ids, segments), result.segmentation)
        if self.aware is not None and self.categories is not None:
            result = self.categories.vote(index, result)
            matches = self.aware.add(ids, segments, result.segmentation, result.segments_info, image_id=name)
        if self.semantic is not None:
            self.semantic.add(ids, segments, result.segmentation, result.segments_info)
        return result, matches

    def report(self) -> dict[str, Any]:
        """Merges all ranks' parts, and gives every rank their report in percent; see `run.evaluate`."""
        report: dict[str, Any] = {"class_agnostic": in_percent(merge(self.agnostic).compute())}
        if self.aware is not None and self.categories is not None:
            facts = {"categories_from": self.categories.label, "upper_bound": self.categories.upper_bound}
            aware = by_category_in_percent(merge(self.aware).compute())
            report["class_aware"] = facts | aware
            if self.semantic is not None:
                # a pair of segments matches by its pixels alone; with equal categories it is a match here too
                right, matched = (
                    sum(each["tp"] for each in aware["per_category"].values()),
                    report["class_agnostic"]["tp"],
                )
                report["class_aware"]["category_accuracy"] = 100.0 * right / max(matched, 1)
                _add_semantic(report["class_aware"], merge(self.semantic).result(), self.categories.dataset.categories)
        if self.mean_iou is not None:
            result = merge(self.mean_iou).result()
            report["mean_iou"] = {"miou": 100.0 * result["miou"], "segments": result["n"]}
        report["baselines"] = {name: in_percent(merge(stat).compute()) for name, stat in self.baselines.items()}
        return report


def _add_semantic(report: dict[str, Any], result: dict[str, Any], categories: Sequence[dict[str, Any]]) -> None:
    """Puts mIoU, and each category's name and IoU, in percent, into a class-aware report."""
    report["miou"] = 100.0 * result["miou"]
    for category in categories:
        entry = report["per_category"].get(str(category["id"]))
        if entry is not None:
            iou = 100.0 * result["per_category"].get(category["id"], 0.0)
            entry |= {"name": name_of(category), "semantic_iou": iou}


class InpaintingScores:
    """Counts panoptic quality for each (block, probability), over whole images and over the dropped pixels alone.

    Args:
        names: rows of the report, MODEL among them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.whole = {name: InpaintingStat() for name in names}
        self.unknown = {name: InpaintingStat() for name in names}

    def add(
        self,
        sparsity: tuple[int, float],
        name: str,
        truth: tuple[np.ndarray, Sequence[dict[str, Any]]],
        given: np.ndarray,
        dropped: np.ndarray,
        results: dict[str, PanopticResult],
    ) -> None:
        """Counts one image.

        Args:
            sparsity: side of the dropped blocks in pixels, and their probability.
            name: what errors call the image; another for each.
            truth: ids int32 [H, W], 0 = void, and COCO's segments_info.
            given: the map without crowds, int32 [H, W].
            dropped: bool [H, W].
            results: maps of MODEL, and of PLAIN where that is a row.
        """
        filled = {
            VOID: lambda: np.where(dropped, 0, given),
            NEAREST: lambda: np.where(dropped, fill_nearest(given, ~dropped & (given != 0)), given),
        }
        ids, segments = truth
        hidden_ids, hidden_segments = only_dropped(ids, segments, dropped)
        for row in self.whole:
            if row in filled:
                pred_ids = filled[row]()
                pred_segments: Sequence[Any] = segments_of(pred_ids)
            else:
                pred_ids, pred_segments = results[row].segmentation, results[row].segments_info
            self.whole[row].add(*sparsity, ids, segments, pred_ids, pred_segments, name)
            inside = only_dropped(pred_ids, pred_segments, dropped)
            self.unknown[row].add(*sparsity, hidden_ids, hidden_segments, *inside, name)

    def report(self) -> dict[str, Any]:
        """Merges all ranks' parts, and gives every rank their report in percent.

        It has `sparsities`, `mean_pq` and `paper_mean_pq` of the model (see `InpaintingStat.result`), each row with
        `unknown_pq` too, and the same of each baseline in `baselines`.
        """
        reports = {}
        for name in self.whole:
            report, unknown = merge(self.whole[name]).result(), merge(self.unknown[name]).result()
            for row, other in zip(report["sparsities"], unknown["sparsities"]):
                row |= {key: 100.0 * row[key] for key in ("pq", "sq", "rq", "pq_crowd_correct")}
                row["unknown_pq"] = 100.0 * other["pq"]
            report["mean_pq"] = {block: 100.0 * pq for block, pq in report["mean_pq"].items()}
            report["mean_unknown_pq"] = {block: 100.0 * pq for block, pq in unknown["mean_pq"].items()}
            if report["paper_mean_pq"] is not None:
                report["paper_mean_pq"] *= 100.0
            reports[name] = report
        return reports.pop(MODEL) | {"baselines": reports}


def without_crowds(ids: np.ndarray, segments: Sequence[dict[str, Any]]) -> np.ndarray:
    """Makes the crowd regions of a map void: ids int32 [H, W] with COCO's segments_info, to int32 [H, W]."""
    crowds = [segment["id"] for segment in segments if segment.get("iscrowd", 0)]
    return np.where(np.isin(ids, crowds), 0, ids).astype(np.int32) if crowds else ids


def in_percent(result: dict[str, Any]) -> dict[str, Any]:
    """Takes what `PanopticQuality.compute` counts class-agnostically: qualities in percent, and tp, fp, fn."""
    values = result["class_agnostic"]
    report = {key: 100.0 * values[key] for key in QUALITIES if key in values}
    report["pq_crowd_correct"] = 100.0 * result["pq_crowd_correct"]
    return report | {key: values[key] for key in ("tp", "fp", "fn")}


def by_category_in_percent(result: dict[str, Any]) -> dict[str, Any]:
    """Takes `All`, `Things`, `Stuff` and `per_category` of `PanopticQuality.compute`, with qualities in percent."""

    def scaled(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {key: 100.0 * entry[key] for key in QUALITIES if key in entry}

    groups = {group: scaled(result[group]) for group in ("All", "Things", "Stuff")}
    return groups | {"per_category": {key: scaled(entry) for key, entry in result["per_category"].items()}}


def merge(stat: Any) -> Any:
    """Merges all ranks' parts of a statistic, on every rank; it has a method `merge(other)`."""
    merged, *others = distributed.gather_objects(stat)
    for other in others:
        merged = merged.merge(other)
    return merged


def rank_batches(count: int, size: int) -> list[list[int]]:
    """Lists this rank's batches of the images 0..`count` - 1, of at most `size` each.

    They are the same batches for any number of ranks: what a network computes for an image can depend, in the last
    digits, on the images beside it.
    """
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    return batches[distributed.rank() :: distributed.world_size()]
