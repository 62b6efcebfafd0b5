"""Writes the table that `ldmseg evaluate` prints."""

from __future__ import annotations

from typing import Any

from ldmseg_fast.evaluation.agreement import format_agreement


def format_report(report: dict[str, Any]) -> str:
    """Writes a report of `evaluate` as text, in percent."""
    thresholds = " / ".join(f"{value:g}" for value in report["thresholds"].values())
    lines = [
        f"{report['mode']} on {report['data']}/{report['split']}, {report['images']} images, thresholds {thresholds}"
    ]
    if "connected" in report:
        lines[0] += f", connected pieces from {report['connected']} pixels"
    deviation = report.get("seeds", {}).get("deviation", {})
    if deviation:
        lines.append(f"mean +- deviation over {len(report['seeds']['seeds'])} seeds ({_seeds(report)})")
    if "inpainting" in report:
        lines += _inpainting(report["inpainting"], deviation.get("inpainting", {}))
    else:
        lines += _class_agnostic(report, deviation)
    if "mean_iou" in report:
        value, spread = report["mean_iou"], deviation.get("mean_iou", {})
        lines.append(f"mIoU over {value['segments']:g} segments: {_cell(value, spread, 'miou').strip()}")
    if "class_aware" in report:
        lines += _class_aware(report["class_aware"], deviation.get("class_aware", {}))
    if report["seconds_per_image"]:
        lines.append(f"{1000 * report['seconds_per_image']:.1f} ms per predicted image ({report['backend']})")
    else:
        lines.append("every result was read back")
    if "agreement" in report:
        lines.append(format_agreement(report["agreement"], report["seconds_per_image"]))
    return "\n".join(lines)


def _seeds(report: dict[str, Any]) -> str:
    seeds = report["seeds"]["seeds"]
    return f"{seeds[0]} to {seeds[-1]}"


def _cell(row: dict[str, Any], deviation: dict[str, Any], key: str) -> str:
    """A percentage, with its deviation where there are several seeds."""
    text = f"{row[key]:7.2f}"
    return f"{text} +- {deviation[key]:4.2f}" if key in deviation else text


def _head(names: tuple[str, ...], deviation: Any) -> str:
    width = 15 if deviation else 7
    return " ".join(f"{name:>7s}{'':{width - 7}s}" for name in names)


def _class_agnostic(report: dict[str, Any], deviation: dict[str, Any]) -> list[str]:
    counts = " ".join(f"{name:>7s}" for name in ("TP", "FP", "FN"))
    label = "class-agnostic" if "class_aware" in report else ""  # the mode says it of the others
    lines = [f"{label:14s} {_head(('PQ', 'SQ', 'RQ'), deviation)} {counts}"]
    spreads = {"model": deviation.get("class_agnostic", {})} | deviation.get("baselines", {})
    for name, row in ({"model": report["class_agnostic"]} | report["baselines"]).items():
        numbers = " ".join(_cell(row, spreads.get(name, {}), key) for key in ("pq", "sq", "rq"))
        lines.append(f"{name:14s} {numbers} " + " ".join(f"{row[key]:7g}" for key in ("tp", "fp", "fn")))
    if "boundary_pq" in report["class_agnostic"]:
        lines.append(f"boundary PQ: {_cell(report['class_agnostic'], spreads['model'], 'boundary_pq').strip()}")
    lines.append(f"PQ, every crowd region excusing false positives: {report['class_agnostic']['pq_crowd_correct']:.2f}")
    return lines


def _class_aware(report: dict[str, Any], deviation: dict[str, Any]) -> list[str]:
    lines = [
        f"class-aware, categories {'of' if 'miou' in report else 'voted by'} {report['categories_from']}",
        f"{'':14s} {_head(('PQ', 'SQ', 'RQ'), deviation)} {'N':>7s}",
    ]
    for name in ("All", "Things", "Stuff"):
        numbers = " ".join(_cell(report[name], deviation.get(name, {}), key) for key in ("pq", "sq", "rq"))
        lines.append(f"{name:14s} {numbers} {report[name]['n']:7g}")
    if "miou" in report:
        lines += _categories(report, deviation)
    return lines


def _categories(report: dict[str, Any], deviation: dict[str, Any]) -> list[str]:
    """mIoU, and a row for each category that occurs."""
    width = max((len(entry["name"]) for entry in report["per_category"].values()), default=0)
    lines = [
        f"matched segments with the right category: {_cell(report, deviation, 'category_accuracy').strip()} %",
        f"mIoU over categories: {_cell(report, deviation, 'miou').strip()}",
    ]
    lines.append(f"{'category':{max(width, 14)}s} {'PQ':>7s} {'SQ':>7s} {'RQ':>7s} {'IoU':>7s}")
    for entry in report["per_category"].values():
        numbers = " ".join(f"{entry[key]:7.2f}" for key in ("pq", "sq", "rq", "semantic_iou"))
        lines.append(f"{entry['name']:{max(width, 14)}s} {numbers}")
    return lines


def _inpainting(report: dict[str, Any], deviation: dict[str, Any]) -> list[str]:
    """PQ of the model and the baselines per sparsity, and over the dropped pixels alone."""
    reports = {"model": report} | report["baselines"]
    spreads = {"model": deviation} | deviation.get("baselines", {})
    rows = [["block", "dropped", *reports]]
    for place, first in enumerate(report["sparsities"]):
        cells = []
        for name, tree in reports.items():
            spread = spreads[name]["sparsities"][place] if deviation else {}
            cells.append(_pair(tree["sparsities"][place], spread))
        rows.append([f"{first['block']:d}", f"{100 * first['probability']:.4g}%", *cells])
    for block in report["mean_pq"]:
        cells = [
            _pair(_mean(tree, block), _mean(spreads[name], block) if deviation else {})
            for name, tree in reports.items()
        ]
        rows.append([block, "mean", *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:>{width}s}" for cell, width in zip(row, widths)) for row in rows]
    return ["PQ of the whole image | PQ of the dropped pixels alone", *lines]


def _mean(tree: dict[str, Any], block: str) -> dict[str, float]:
    return {"pq": tree["mean_pq"][block], "unknown_pq": tree["mean_unknown_pq"][block]}


def _pair(row: dict[str, Any], deviation: dict[str, Any]) -> str:
    cells = [f"{row[key]:5.2f}" + (f" +- {deviation[key]:4.2f}" if deviation else "") for key in ("pq", "unknown_pq")]
    return " | ".join(cells)
