"""`ldmseg pq GT_JSON PRED_JSON`: its arguments, and what it prints and writes."""

import argparse
import json
import sys
from pathlib import Path

from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.metrics.pq_report import format_table, write_csv
from ldmseg_fast.panoptic_format import PanopticFormatError, replacing


def add_pq_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt_json", type=Path, metavar="GT_JSON", help="COCO panoptic ground truth")
    parser.add_argument("pred_json", type=Path, metavar="PRED_JSON", help="predictions in the same format")
    parser.add_argument("--gt-folder", type=Path, help="PNGs of the ground truth (default: GT_JSON without .json)")
    parser.add_argument("--pred-folder", type=Path, help="PNGs of the predictions (default: PRED_JSON without .json)")
    parser.add_argument("--class-agnostic", action="store_true", help="count every segment as one category, 'object'")
    parser.add_argument("--allow-missing", action="store_true", help="count images without prediction as empty")
    parser.add_argument("--boundary", action="store_true", help="add a column with boundary-aware PQ")
    parser.add_argument("--csv", type=Path, help="write one line per category")
    parser.add_argument("--json", type=Path, help="write the whole report, fractions")
    parser.add_argument(
        "--processes", "--threads", type=_positive, metavar="N", help="worker threads (default: one a core, at most 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap interval (default: 0)")


def run_pq(args: argparse.Namespace) -> int:
    """Exit code 0, or 2 with one line on stderr for input that cannot be scored."""
    for report in (args.json, args.csv):
        if report is not None and not report.parent.is_dir():
            print(f"error: {report}: its folder does not exist; create it first", file=sys.stderr)
            return 2
    try:
        result = evaluate_files(
            args.gt_json,
            args.pred_json,
            args.gt_folder,
            args.pred_folder,
            class_agnostic=args.class_agnostic,
            allow_missing=args.allow_missing,
            num_threads=args.processes,
            boundary=args.boundary,
            seed=args.seed,
        )
    except (PanopticFormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(result))
    print(f"{result['images']} images in {result['seconds']:.2f} s on {result['threads']} threads")
    if args.csv:
        write_csv(args.csv, result)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
