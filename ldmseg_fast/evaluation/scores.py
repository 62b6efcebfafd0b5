"""What is counted while results come in, and how the ranks' parts become one report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldmseg_fast import distributed
from ldmseg_fast.evaluation.categories import CategorySource
from ldmseg_fast.metrics.baselines import BASELINES, fill_nearest, segments_of
from ldmseg_fast.metrics.inpainting import InpaintingStat, only_dropped
from ldmseg_fast.metrics.miou import MeanIoU
from ldmseg_fast.metrics.pq import PQStat
from ldmseg_fast.panoptic.results import PanopticResult

OBJECT = [{"id": 1, "name": "object", "supercategory": "object", "isthing": 1}]

MODEL, VOID, NEAREST, PLAIN = "model", "dropped pixels void", "nearest known pixel", "without given pixels"


class SegmentationScores:
    """Class-agnostic panoptic quality, and on request class-aware quality, mean IoU and trivial baselines."""

    def __init__(self, categories: CategorySource | None, mean_iou: bool, baselines: bool) -> None:
        self.categories = categories
        self.agnostic = PQStat(OBJECT, class_agnostic=True)
        self.aware = PQStat(categories.dataset.categories) if categories else None
        self.mean_iou = MeanIoU() if mean_iou else None
        self.baselines = {name: PQStat(OBJECT, class_agnostic=True) for name in BASELINES} if baselines else {}

    def add(
        self,
        index: int,
        truth: tuple[np.ndarray, Sequence[dict[str, Any]]],
        result: PanopticResult,
        voted: PanopticResult | None,
    ) -> np.ndarray:
        """Counts one image; returns its rows of `MATCH_DTYPE`, those with categories where there are any."""
        ids, segments = truth
        matches = self.agnostic.add(ids, segments, result.segmentation, result.segments_info, image_id=index)
        for name, baseline in self.baselines.items():
            guess = BASELINES[name](*ids.shape)
            baseline.add(ids, segments, guess, segments_of(guess), image_id=index)
        if self.mean_iou is not None:
            self.mean_iou.add(without_crowds(ids, segments), result.segmentation)
        if self.aware is not None and voted is not None:
            matches = self.aware.add(ids, segments, voted.segmentation, voted.segments_info, image_id=index)
        return matches

    def report(self) -> dict[str, Any]:
        """All ranks' parts as one, in percent, on every rank."""
        report: dict[str, Any] = {"class_agnostic": in_percent(merge(self.agnostic).result())}
        if self.aware is not None and self.categories is not None:
            facts = {"categories_from": self.categories.label, "upper_bound": self.categories.upper_bound}
            report["class_aware"] = facts | by_category_in_percent(merge(self.aware).result())
        if self.mean_iou is not None:
            result = merge(self.mean_iou).result()
            report["mean_iou"] = {"miou": 100.0 * result["miou"], "segments": result["n"]}
        report["baselines"] = {name: in_percent(merge(stat).result()) for name, stat in self.baselines.items()}
        return report


class InpaintingScores:
    """Panoptic quality for each (block, probability), over the whole image and over the dropped pixels alone."""

    def __init__(self, names: Sequence[str]) -> None:
        self.whole = {name: InpaintingStat() for name in names}
        self.unknown = {name: InpaintingStat() for name in names}

    def add(
        self,
        sparsity: tuple[int, float],
        index: int,
        truth: tuple[np.ndarray, Sequence[dict[str, Any]]],
        given: np.ndarray,
        dropped: np.ndarray,
        results: dict[str, PanopticResult],
    ) -> None:
        """One image. given: its map without crowds, [H, W]. results: of MODEL, and of PLAIN where that is a row."""
        filled = {
            VOID: lambda: np.where(dropped, 0, given),
            NEAREST: lambda: np.where(dropped, fill_nearest(given, ~dropped & (given != 0)), given),
        }
        ids, segments = truth
        hidden_ids, hidden_segments = only_dropped(ids, segments, dropped)
        for name in self.whole:
            if name in filled:
                pred_ids = filled[name]()
                pred_segments: Sequence[Any] = segments_of(pred_ids)
            else:
                pred_ids, pred_segments = results[name].segmentation, results[name].segments_info
            self.whole[name].add(*sparsity, ids, segments, pred_ids, pred_segments, index)
            inside = only_dropped(pred_ids, pred_segments, dropped)
            self.unknown[name].add(*sparsity, hidden_ids, hidden_segments, *inside, index)

    def report(self) -> dict[str, Any]:
        """All ranks' parts as one, in percent: `sparsities`, `mean_pq` and `paper_mean_pq` of the model (see
        `InpaintingStat.result`), each row with `unknown_pq` too, and the same of each baseline in `baselines`."""
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
    """A map [H, W] whose crowd regions are void."""
    crowds = [segment["id"] for segment in segments if segment.get("iscrowd", 0)]
    return np.where(np.isin(ids, crowds), 0, ids).astype(np.int32) if crowds else ids


def in_percent(result: dict[str, Any]) -> dict[str, Any]:
    """pq, sq, rq and pq_crowd_correct in percent, and the counts."""
    values = result["class_agnostic"]
    report = {key: 100.0 * values[key] for key in ("pq", "sq", "rq")}
    report["pq_crowd_correct"] = 100.0 * result["pq_crowd_correct"]
    return report | {key: values[key] for key in ("tp", "fp", "fn")}


def by_category_in_percent(result: dict[str, Any]) -> dict[str, Any]:
    """`All`, `Things`, `Stuff` and `per_category` of `PQStat.result`, qualities in percent."""

    def scaled(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {key: 100.0 * entry[key] for key in ("pq", "sq", "rq")}

    groups = {group: scaled(result[group]) for group in ("All", "Things", "Stuff")}
    return groups | {"per_category": {key: scaled(entry) for key, entry in result["per_category"].items()}}


def merge(stat: Any) -> Any:
    """All ranks' parts as one, on every rank."""
    merged, *others = distributed.gather_objects(stat)
    for other in others:
        merged = merged.merge(other)
    return merged


def rank_batches(count: int, size: int) -> list[list[int]]:
    """This rank's batches of `count` images.

    They are the same batches for any number of ranks: what a network computes for an image can depend, in the last
    digits, on the images beside it.
    """
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    return batches[distributed.rank() :: distributed.world_size()]
