"""Tells a panoptic quality: table, interval, quality per image, CSV. The table is panopticapi's."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.files import replacing
from ldmseg_fast.metrics.matching import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE
from ldmseg_fast.metrics.pq import PanopticQuality


def format_table(result: dict[str, Any]) -> str:
    """Formats panopticapi's table in percent, with notes below.

    Boundary PQ is a fifth column where it was computed.
    """
    boundary = "boundary_pq" in result["All"]
    lines = [f"{'':10s}| {'PQ':>5s}  {'SQ':>5s}  {'RQ':>5s} {'N':>5s}" + (f"  {'BPQ':>5s}" if boundary else "")]
    lines.append("-" * (len(lines[0]) + 1))
    for name in ("All", "Things", "Stuff"):
        row = result[name]
        pq, sq, rq = (100 * row[key] for key in ("pq", "sq", "rq"))
        extra = f"  {100 * row['boundary_pq']:5.1f}" if boundary else ""
        lines.append(f"{name:10s}| {pq:5.1f}  {sq:5.1f}  {rq:5.1f} {row['n']:5d}{extra}")
    if "crowd_correct" in result:
        row = result["crowd_correct"]
        lines.append(
            f"{'All crowds':10s}| {100 * row['pq']:5.1f}  {100 * row['sq']:5.1f}  {100 * row['rq']:5.1f} {row['n']:5d}"
            "  (every crowd region excuses false positives, not the last one alone)"
        )
    if result.get("interval"):
        low, high = result["interval"]["pq"]
        lines.append(f"95 % interval of PQ over {result['images']} images: {100 * low:.1f} .. {100 * high:.1f}")
    sizes = "  ".join(f"{name} {100 * row['pq']:.1f} ({row['n']})" for name, row in result["sizes"].items() if row["n"])
    lines.append(f"PQ by segment size (categories): {sizes}")
    if result.get("worst_images"):
        worst = "  ".join(f"{image['image_id']} {100 * image['pq']:.1f}" for image in result["worst_images"])
        lines.append(f"worst images: {worst}")
    if result.get("missing"):
        lines.append(f"{len(result['missing'])} images without prediction count as empty")
    if result.get("ignored"):
        lines.append(f"{len(result['ignored'])} predicted images that the ground truth does not list are left out")
    return "\n".join(lines)


def image_qualities(stat: PanopticQuality) -> list[dict[str, Any]]:
    """Lists the quality of each image over its segments of all categories.

    Each entry has image_id, pq (None without segments), tp, fp, fn and iou.
    """
    matches, count = stat.matches(), len(stat.image_ids)
    tp, fp, fn, iou = _sums(matches, matches["image"], count)
    weight = tp + 0.5 * fp + 0.5 * fn
    return [
        {
            "image_id": image_id,
            "pq": float(iou[index] / weight[index]) if weight[index] else None,
            "tp": int(tp[index]),
            "fp": int(fp[index]),
            "fn": int(fn[index]),
            "iou": float(iou[index]),
        }
        for index, image_id in enumerate(stat.image_ids)
    ]


def bootstrap_interval(
    stat: PanopticQuality, replicates: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Any] | None:
    """Returns the percentile interval of PQ when images are drawn anew with replacement; None without images.

    It does not depend on the order in which images were added. Source: Efron, "Bootstrap methods: another look at the
    jackknife", 1979.
    """
    matches, count = stat.matches(), len(stat.image_ids)
    if not count or not len(matches) or not replicates:
        return None
    by_id = np.empty(count, np.int64)
    by_id[sorted(range(count), key=lambda index: str(stat.image_ids[index]))] = np.arange(count)
    categories = np.fromiter(stat.categories, np.int64)
    order = np.argsort(categories)
    category = order[np.searchsorted(categories, matches["category_id"], sorter=order)]
    cells, cell = np.unique(by_id[matches["image"]] * len(categories) + category, return_inverse=True)
    del category
    tp, fp, fn, iou = _sums(matches, cell, len(cells))
    weight, image, category = tp + 0.5 * fp + 0.5 * fn, *np.divmod(cells, len(categories))
    generator, values = np.random.default_rng(seed), []
    for _ in range(replicates):
        times = np.bincount(generator.integers(0, count, count), minlength=count)[image]
        total = np.bincount(category, times * weight, len(categories))
        quality = np.bincount(category, times * iou, len(categories))
        present = total > 0
        values.append(float(np.mean(quality[present] / total[present])) if present.any() else 0.0)
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return {"pq": [float(low), float(high)], "level": level, "replicates": replicates, "seed": seed}


def write_csv(path: str | Path, result: dict[str, Any]) -> None:
    """Writes one line per category that occurs: id, name, isthing, counts, iou, pq, sq, rq (fractions)."""
    names = ["tp", "fp", "fn", "iou", "pq", "sq", "rq"] + (["boundary_pq"] if "boundary_pq" in result["All"] else [])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["category_id", "name", "isthing", *names])
    for category_id, entry in result["per_category"].items():
        writer.writerow([category_id, entry["name"], entry["isthing"], *(entry[name] for name in names)])
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _sums(matches: np.ndarray, group: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums tp, fp, fn and IoU per group, each [count]."""
    outcome = matches["outcome"]
    tp, fp, fn = (
        np.bincount(group[chosen], minlength=count)
        for chosen in (outcome == TRUE_POSITIVE, outcome >= FALSE_POSITIVE, outcome == FALSE_NEGATIVE)
    )
    iou = np.zeros(count)
    order = np.lexsort((matches["iou"], group))  # the same sum whatever order images came in
    np.add.at(iou, group[order], matches["iou"][order])
    return tp, fp, fn, iou
