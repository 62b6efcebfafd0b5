"""Tells whether the agreement of samples predicts errors: the share of wrong pixels by agreement, of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.evaluation import EvaluationOptions, resolve_thresholds
from ldmseg_fast.evaluation.run import load_predictor
from ldmseg_fast.evaluation.scores import without_crowds
from ldmseg_fast.inference.ensemble import EnsembleResult
from ldmseg_fast.metrics.matching import TRUE_POSITIVE, match_segments, segment_table

Row = dict[str, Any]
BOUNDS = (0.5, 0.75, 0.999)  # a pixel belongs to the first that its agreement does not exceed
BANDS = ("up to 0.5", "to 0.75", "below 1", "1")
ALL = "any"


def right_pixels(ids: np.ndarray, segments: Sequence[dict[str, Any]], result: EnsembleResult) -> np.ndarray:
    """Marks the pixels, bool [H, W], on which a predicted segment and its match in the truth, int [H, W], both lie."""
    predicted = result.segmentation
    tables = segment_table(segments, class_agnostic=True), segment_table(result.segments_info, class_agnostic=True)
    matches = match_segments(ids, tables[0], predicted, tables[1])
    pairs = matches[matches["outcome"] == TRUE_POSITIVE]
    return np.isin(ids.astype(np.int64) << 24 | predicted, pairs["gt_id"].astype(np.int64) << 24 | pairs["pred_id"])


def count_bands(ids: np.ndarray, segments: Sequence[dict[str, Any]], result: EnsembleResult) -> np.ndarray:
    """Counts pixels, and those that are not right, of each of `BANDS`: int64 [2, 4]. Void and crowds do not count."""
    labelled = without_crowds(ids, segments) != 0
    band = np.digitize(result.agreement[labelled], BOUNDS, right=True)
    wrong = ~right_pixels(ids, segments, result)[labelled]
    return np.stack([np.bincount(each, minlength=len(BANDS)) for each in (band, band[wrong])])


def agreement_rows(name: str, model_dir: Path, data: str, *, options: EvaluationOptions, weights: str) -> list[Row]:
    """Returns a row for each of `BANDS` and one for all pixels: how many of its pixels are wrong, in percent.

    `pixels` is the band's share of all pixels in percent. A band without pixels has 0 in both.
    """
    predictor = load_predictor(model_dir, data, options, resolve_thresholds(model_dir, options))
    dataset, counts = predictor.dataset, np.zeros((2, len(BANDS)), np.int64)
    for start in range(0, len(dataset), options.batch_size):
        batch = range(start, min(start + options.batch_size, len(dataset)))
        for index, result in zip(batch, predictor.segment(batch, options.seed)):
            assert isinstance(result, EnsembleResult)
            counts += count_bands(*dataset.ground_truth(index), result)
    case = {"data": Path(data).name, "split": options.split, "images": len(dataset), "mode": "agreement"}
    case |= {"steps": predictor.facts["num_inference_steps"], "solver": options.solver, "samples": options.samples}
    total = max(int(counts[0].sum()), 1)
    return [
        {
            "name": "wrong pixels",
            "variant": name,
            "case": case | {"agreement": band},
            "value": 100 * wrong / max(pixels, 1),
            "pixels": 100 * pixels / total,
            "weights": weights,
        }
        for band, (pixels, wrong) in zip((*BANDS, ALL), [*counts.T.tolist(), counts.sum(1).tolist()])
    ]
