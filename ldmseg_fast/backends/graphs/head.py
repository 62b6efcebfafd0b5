"""Ends the post-processing of graphs with a panoptic head: the filter by area, on the host."""

from __future__ import annotations

import numpy as np

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.panoptic.postprocess import PanopticResult, make_segments_info


def finish(
    label: np.ndarray, confidence: np.ndarray, sigmoid_area: np.ndarray, thresholds: PostprocessConfig
) -> list[PanopticResult]:
    """Makes what `postprocess` returns from the outputs of the `mask_decoder` graph.

    Args:
        label: uint8 [B, H, W], 0 where no slot reached the mask threshold.
        confidence: uint8 [B, H, W], 255 times the softmax probability; scores are exact to 1/510.
        sigmoid_area: integer [B, Q], pixels.
        thresholds: the mask threshold is already in the labels.

    Returns:
        A PanopticResult per image, whose segmentation is int32 [H, W].
    """
    return [
        _finish_one(label[image], confidence[image], sigmoid_area[image], thresholds) for image in range(len(label))
    ]


def _finish_one(
    label: np.ndarray, confidence: np.ndarray, sigmoid_area: np.ndarray, thresholds: PostprocessConfig
) -> PanopticResult:
    """Does `finish` for one image: label and confidence [H, W], sigmoid_area [Q]."""
    slots = len(sigmoid_area)
    area = np.bincount(label.ravel(), minlength=slots)
    overlap = area / np.maximum(sigmoid_area, 1)
    kept = (area >= thresholds.count_threshold) & ((sigmoid_area == 0) | (overlap >= thresholds.overlap_threshold))
    kept &= area > 0
    kept[0] = False  # slot 0 is void
    segmentation = np.where(kept, np.arange(1, slots + 1), 0).astype(np.int32)[label]
    total = np.bincount(label.ravel(), confidence.ravel(), minlength=slots) / 255.0
    score = np.where(kept, total / np.maximum(area, 1), 0.0)
    return PanopticResult(segmentation, make_segments_info(area * kept, _boxes(label, slots), score))


def _boxes(label: np.ndarray, slots: int) -> np.ndarray:
    """Finds x, y, width and height of each slot's pixels, [Q, 4] int64; zeros where it has none."""
    height, width = label.shape
    in_row: np.ndarray = np.zeros((height, slots), bool)
    in_column: np.ndarray = np.zeros((width, slots), bool)
    in_row[np.arange(height)[:, None], label] = True
    in_column[np.arange(width)[None, :], label] = True
    x, y = in_column.argmax(0), in_row.argmax(0)
    right, bottom = width - in_column[::-1].argmax(0), height - in_row[::-1].argmax(0)
    boxes: np.ndarray = np.stack([x, y, right - x, bottom - y], 1)
    boxes[~in_row.any(axis=0)] = 0
    return boxes
