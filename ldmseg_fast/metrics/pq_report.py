"""Tells a panoptic quality: table, interval, quality per image, CSV. The table is panopticapi's."""

import csv
import io
from pathlib import Path
from typing import Any

from ldmseg_fast.files import replacing
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.metrics.resampling import sums


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
    errors = (f"{name} {100 * result['lrp'][name]['lrp']:.1f}" for name in ("All", "Things", "Stuff"))
    parts = result["lrp"]["All"]
    shares = ", ".join(
        f"{text} {100 * parts[name]:.1f}"
        for name, text in (("lrp_loc", "1 - IoU"), ("lrp_fp", "false"), ("lrp_fn", "missed"))
    )
    lines.append(f"LRP (0 is best): {'  '.join(errors)}  ({shares})")
    sizes = "  ".join(f"{name} {100 * row['pq']:.1f} ({row['n']})" for name, row in result["sizes"].items() if row["n"])
    lines.append(f"PQ by segment size (categories): {sizes}")
    if result.get("worst_images"):
        worst = "  ".join(f"{image['image_id']} {100 * image['pq']:.1f}" for image in result["worst_images"])
        lines.append(f"worst images: {worst}")
    lines += _slice_lines(result["slices"]) if "slices" in result else []
    if result.get("missing"):
        lines.append(f"{len(result['missing'])} images without prediction count as empty")
    if result.get("ignored"):
        lines.append(f"{len(result['ignored'])} predicted images that the ground truth does not list are left out")
    lines += [f"{name}: {count}" for name, count in result.get("overlaps", {}).items()]
    return "\n".join(lines)


def _slice_lines(slices: dict[str, Any]) -> list[str]:
    values = ["(none)" if row["value"] is None else row["value"] for row in slices["rows"]]
    width = max(len(text) for text in [*values, slices["column"]])
    lines = [f"{slices['column']:{width}s}| {'PQ':>5s}  {'Things':>6s}  {'Stuff':>5s} {'images':>7s}"]
    for value, row in zip(values, slices["rows"]):
        pq, things, stuff = (100 * row[group]["pq"] for group in ("All", "Things", "Stuff"))
        lines.append(f"{value:{width}s}| {pq:5.1f}  {things:6.1f}  {stuff:5.1f} {row['images']:7d}")
    return lines


def format_comparison(comparison: dict[str, Any], first: str, second: str, most: int = 5) -> str:
    """Formats what `compare` returned; `first` and `second` are what the methods are called."""
    pq = [100 * value for value in comparison["pq"]]
    lines = [f"PQ of {first}: {pq[0]:.2f}", f"PQ of {second}: {pq[1]:.2f}"]
    text = f"difference {pq[1] - pq[0]:+.2f}"
    if comparison["interval"]:
        low, high = (100 * value for value in comparison["interval"])
        text += f", 95 % interval {low:+.2f} .. {high:+.2f} (paired bootstrap)"
    lines.append(f"{text}, p = {comparison['p_value']:.3g} (paired permutation test)")
    changed = [row for row in comparison["changed"] if row["difference"]][:most]
    if changed:
        listed = "  ".join(f"{row['image_id']} {100 * row['difference']:+.1f}" for row in changed)
        lines.append(f"images that changed most: {listed}")
    return "\n".join(lines)


def image_qualities(stat: PanopticQuality) -> list[dict[str, Any]]:
    """Lists the quality of each image over its segments of all categories.

    Each entry has image_id, pq (None without segments), tp, fp, fn and iou.
    """
    matches, count = stat.matches(), len(stat.image_ids)
    tp, fp, fn, iou = sums(matches, matches["image"], count)
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


def write_csv(path: str | Path, result: dict[str, Any]) -> None:
    """Writes one line per category that occurs: id, name, isthing, counts, iou, pq, sq, rq (fractions)."""
    names = ["tp", "fp", "fn", "iou", "pq", "sq", "rq"] + (["boundary_pq"] if "boundary_pq" in result["All"] else [])
    rows = [
        [category_id, entry["name"], entry["isthing"], *(entry[name] for name in names)]
        for category_id, entry in result["per_category"].items()
    ]
    _write_rows(path, ["category_id", "name", "isthing", *names], rows)


def write_image_csv(path: str | Path, result: dict[str, Any]) -> None:
    """Writes one line per image: image_id, pq (empty without segments), tp, fp, fn, iou, and the column of slices."""
    columns = ["image_id", "pq", "tp", "fp", "fn", "iou"]
    columns += [result["slices"]["column"]] if "slices" in result else []
    _write_rows(path, columns, [[image[column] for column in columns] for image in result["per_image"]])


def _write_rows(path: str | Path, header: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
