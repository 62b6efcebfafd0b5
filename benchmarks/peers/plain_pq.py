"""Computes panoptic quality the straightforward way: what the fast implementation is tested and timed against.

Written from the description of the metric (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4.1) and of
panopticapi's treatment of void and crowds; shares no code with ldmseg_fast.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Counts = dict[int, list[float]]  # category -> [tp, fp, fn, iou]


def match_by_masks(
    gt: np.ndarray,
    gt_segments: list[dict[str, Any]],
    pred: np.ndarray,
    pred_segments: list[dict[str, Any]],
    every_crowd: bool = False,
) -> Counts:
    """Matches one image with a boolean mask per segment.

    `every_crowd` excuses false positives on all crowds, not on the last one only.
    """
    counts: Counts = {}
    void = gt == 0
    matched_gt, matched_pred = set(), set()
    for g in gt_segments:
        counts.setdefault(g["category_id"], [0, 0, 0, 0.0])
        for p in pred_segments:
            if g["iscrowd"] or g["category_id"] != p["category_id"]:
                continue
            g_mask, p_mask = gt == g["id"], pred == p["id"]
            iou = (g_mask & p_mask).sum() / (g_mask | (p_mask & ~void)).sum()
            if iou > 0.5:
                counts[g["category_id"]][0] += 1
                counts[g["category_id"]][3] += float(iou)
                matched_gt.add(g["id"])
                matched_pred.add(p["id"])
    for g in gt_segments:
        if not g["iscrowd"] and g["id"] not in matched_gt:
            counts[g["category_id"]][2] += 1
    for p in pred_segments:
        if p["id"] in matched_pred:
            continue
        crowds = [g["id"] for g in gt_segments if g["iscrowd"] and g["category_id"] == p["category_id"]]
        excused = void | np.isin(gt, crowds if every_crowd else crowds[-1:])
        p_mask = pred == p["id"]
        if (p_mask & excused).sum() / p_mask.sum() <= 0.5:
            counts.setdefault(p["category_id"], [0, 0, 0, 0.0])[1] += 1
    return {category: count for category, count in counts.items() if any(count)}


def average(counts: Counts) -> dict[str, float]:
    """Returns pq, sq, rq over the categories that occur, and their number n."""
    rows = [
        (iou / (tp + fp / 2 + fn / 2), iou / tp if tp else 0.0, tp / (tp + fp / 2 + fn / 2))
        for tp, fp, fn, iou in counts.values()
    ]
    pq, sq, rq = np.mean(rows, axis=0) if rows else (0.0, 0.0, 0.0)
    return {"pq": float(pq), "sq": float(sq), "rq": float(rq), "n": len(rows)}


def numpy_joint_histogram(gt: np.ndarray, pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts the pixels of each pair of ids, the usual numpy way: one sort over 64-bit keys."""
    return np.unique(gt.astype(np.uint64) * 2**24 + pred, return_counts=True)


def evaluate_like_panopticapi(gt_json: Path, pred_json: Path, gt_folder: Path, pred_folder: Path) -> dict[str, float]:
    """Reads and matches as panopticapi does, image by image: Pillow, wide ids, two sorts, Python loops."""
    gt_file, pred_file = json.loads(gt_json.read_text()), json.loads(pred_json.read_text())
    predictions = {entry["image_id"]: entry for entry in pred_file["annotations"]}
    totals: Counts = {}
    for entry in gt_file["annotations"]:
        prediction = predictions[entry["image_id"]]
        gt, pred = _read_wide(gt_folder / entry["file_name"]), _read_wide(pred_folder / prediction["file_name"])
        gt_segments = {segment["id"]: segment for segment in entry["segments_info"]}
        pred_segments = {segment["id"]: segment for segment in prediction["segments_info"]}
        area = dict(zip(*np.unique(pred, return_counts=True)))
        pairs, pixels = np.unique(gt.astype(np.uint64) * 256**3 + pred.astype(np.uint64), return_counts=True)
        overlap = {(int(pair) // 256**3, int(pair) % 256**3): int(n) for pair, n in zip(pairs, pixels)}
        matched_gt, matched_pred, crowd = set(), set(), {}
        for (g, p), intersection in overlap.items():
            if g not in gt_segments or p not in pred_segments or gt_segments[g]["iscrowd"]:
                continue
            category = gt_segments[g]["category_id"]
            if category != pred_segments[p]["category_id"]:
                continue
            iou = intersection / (area[p] + gt_segments[g]["area"] - intersection - overlap.get((0, p), 0))
            if iou > 0.5:
                count = totals.setdefault(category, [0, 0, 0, 0.0])
                count[0] += 1
                count[3] += iou
                matched_gt.add(g)
                matched_pred.add(p)
        for g, segment in gt_segments.items():
            if g in matched_gt:
                continue
            if segment["iscrowd"]:
                crowd[segment["category_id"]] = g
            else:
                totals.setdefault(segment["category_id"], [0, 0, 0, 0.0])[2] += 1
        for p, segment in pred_segments.items():
            if p not in matched_pred:
                excused = overlap.get((0, p), 0) + overlap.get((crowd.get(segment["category_id"]), p), 0)
                if excused / area[p] <= 0.5:
                    totals.setdefault(segment["category_id"], [0, 0, 0, 0.0])[1] += 1
    return average(totals)


def _read_wide(path: Path) -> np.ndarray:
    rgb = np.array(Image.open(path), dtype=np.uint32)
    return rgb[:, :, 0] + 256 * rgb[:, :, 1] + 256**2 * rgb[:, :, 2]
