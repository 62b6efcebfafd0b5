"""`ldmseg pq GT_JSON PRED_JSON` measures the panoptic quality of result files, as panopticapi does."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ldmseg_fast.errors import ArgumentError, PanopticFormatError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt_json", type=Path, metavar="GT_JSON", help="COCO panoptic ground truth")
    parser.add_argument("pred_json", type=Path, metavar="PRED_JSON", help="predictions in the same format")
    parser.add_argument("--gt-folder", type=Path, help="PNGs of the ground truth (default: GT_JSON without .json)")
    parser.add_argument("--pred-folder", type=Path, help="PNGs of the predictions (default: PRED_JSON without .json)")
    parser.add_argument("--class-agnostic", action="store_true", help="count every segment as one category, 'object'")
    parser.add_argument("--allow-missing", action="store_true", help="count images without prediction as empty")
    parser.add_argument("--boundary", action="store_true", help="add a column with boundary-aware PQ")
    parser.add_argument("--csv", type=Path, help="write one line per category")
    parser.add_argument("--json", type=Path, help="write the whole report, as fractions")
    parser.add_argument(
        "--threads", "--processes", type=_positive, metavar="N", help="worker threads (default: one a core, at most 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the bootstrap interval and of --random (default: 0)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="HTML page with pictures of errors")
    parser.add_argument("--worst", type=int, default=8, metavar="K", help="worst images on the page (default 8)")
    parser.add_argument("--random", type=int, default=8, metavar="K", help="random images on the page (default 8)")
    parser.add_argument("--images", type=Path, help="pictures for the page (default: the split's, if they are there)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes what was asked for, and returns 0."""
    import json

    from ldmseg_fast.files import check_output, replacing
    from ldmseg_fast.metrics.pq_files import evaluate_files
    from ldmseg_fast.metrics.pq_report import format_table, write_csv
    from ldmseg_fast.outputs import check_outputs, report_stream

    if min(args.worst, args.random) < 0 or args.worst + args.random == 0:
        raise ArgumentError(
            f"--worst {args.worst} --random {args.random}: neither may be negative, and one must be above 0"
        )
    if args.seed < 0:
        raise ArgumentError(f"--seed {args.seed}: not negative")
    if args.images is not None and not args.page:
        raise ArgumentError("--images needs --page: add it")
    files = {"report": args.json, "categories": args.csv, "page": args.page}
    check_outputs({"--json": args.json, "--csv": args.csv, "--page": args.page}, inputs=_inputs(args))
    for path in files.values():
        if path:
            check_output(path)
    result = evaluate_files(
        args.gt_json,
        args.pred_json,
        args.gt_folder,
        args.pred_folder,
        class_agnostic=args.class_agnostic,
        allow_missing=args.allow_missing,
        num_threads=args.threads,
        boundary=args.boundary,
        seed=args.seed,
    )
    if args.csv:
        write_csv(args.csv, result)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.page:
        from ldmseg_fast.reports.error_files import write_page_of_files

        write_page_of_files(
            args.page,
            result["per_image"],
            args.gt_json,
            args.pred_json,
            args.gt_folder,
            args.pred_folder,
            args.images,
            class_agnostic=args.class_agnostic,
            worst=args.worst,
            random=args.random,
            seed=args.seed,
        )
    stream = report_stream(files.values())
    print(format_table(result), file=stream)
    print(f"{result['images']} images in {result['seconds']:.2f} s on {result['threads']} threads", file=stream)
    for name, path in files.items():
        if path:
            print(f"{name}: {path}", file=stream)
    return 0


def _inputs(args: argparse.Namespace) -> list[Path]:
    """Lists the files and folders that are read; what is missing is told later."""
    from ldmseg_fast.metrics.pq_files import png_folder
    from ldmseg_fast.reports.error_files import picture_folder

    inputs = [args.gt_json, args.pred_json]
    for path, folder in ((args.gt_json, args.gt_folder), (args.pred_json, args.pred_folder)):
        with contextlib.suppress(PanopticFormatError):
            inputs.append(png_folder(path, folder))
    pictures = args.images or picture_folder(args.gt_json)
    return inputs if pictures is None else [*inputs, pictures]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
