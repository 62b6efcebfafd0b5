"""`ldmseg pq GT PRED` measures the panoptic quality of result files, as panopticapi does, and compares methods."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from ldmseg_fast.commands.options import add_report_argument, output_file
from ldmseg_fast.errors import ArgumentError, PanopticFormatError

KINDS = "COCO panoptic JSON with PNGs, COCO instances or results with RLE or polygons, or a folder of panoptic PNGs"


EXAMPLES = (
    "ldmseg pq GT.json PRED.json",
    "ldmseg pq GT.json PRED.json --against OTHER.json --page changes.html",
    "ldmseg pq GT.json PRED.json --json > report.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt_json", type=Path, metavar="GT", help=f"ground truth: {KINDS}")
    parser.add_argument("pred_json", type=Path, metavar="PRED", help="predictions, in any of these forms")
    parser.add_argument("--gt-folder", type=Path, help="PNGs of the ground truth (default: GT without .json)")
    parser.add_argument("--pred-folder", type=Path, help="PNGs of the predictions (default: PRED without .json)")
    parser.add_argument("--class-agnostic", action="store_true", help="count every segment as one category, 'object'")
    parser.add_argument("--allow-missing", action="store_true", help="count images without prediction as empty")
    parser.add_argument("--boundary", action="store_true", help="add a column with boundary-aware PQ")
    parser.add_argument("--csv", type=output_file, help="write one line per category")
    parser.add_argument("--per-image", type=output_file, metavar="FILE", help="write one line per image, as CSV")
    add_report_argument(parser)
    parser.add_argument("--by", metavar="COLUMN", help="PQ of the images of each value, such as weather")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="CSV",
        help="table with image_id or file_name and the column of --by (default: GT)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="predictions of another method, to compare PRED with by a paired test",
    )
    parser.add_argument("--against-folder", type=Path, help="PNGs of OTHER (default: OTHER without .json)")
    parser.add_argument(
        "--threads", "--processes", type=_positive, metavar="N", help="worker threads (default: one a core, at most 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the bootstrap interval, of the test and of --random (default: 0)"
    )
    parser.add_argument(
        "--page",
        type=output_file,
        metavar="FILE",
        help="HTML page with pictures of errors; with --against, of what changed",
    )
    parser.add_argument("--worst", type=int, default=8, metavar="K", help="worst images on the page (default 8)")
    parser.add_argument("--random", type=int, default=8, metavar="K", help="random images on the page (default 8)")
    parser.add_argument("--images", type=Path, help="pictures for the page (default: the split's, if they are there)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes what was asked for, and returns 0."""
    import json

    from ldmseg_fast.files import check_output, replacing
    from ldmseg_fast.metrics.pq_files import match_all, report_of
    from ldmseg_fast.metrics.pq_report import format_comparison, format_table, write_csv, write_image_csv
    from ldmseg_fast.outputs import check_outputs, report_stream

    _check_arguments(args)
    files = {"report": args.json, "categories": args.csv, "images": args.per_image, "page": args.page}
    options = {"--json": args.json, "--csv": args.csv, "--per-image": args.per_image, "--page": args.page}
    check_outputs(options, inputs=_inputs(args))
    for path in files.values():
        if path:
            check_output(path)
    settings = (args.class_agnostic, args.allow_missing, args.threads, args.boundary)
    stat, facts = match_all(args.gt_json, args.pred_json, args.gt_folder, args.pred_folder, *settings)
    result = report_of(stat, facts, seed=args.seed, by=args.by, table=args.table)
    pair, other_pair = facts["pair"], None
    if args.against:
        from ldmseg_fast.metrics.resampling import compare

        other, other_facts = match_all(args.gt_json, args.against, args.gt_folder, args.against_folder, *settings)
        other_pair = other_facts["pair"]
        result["against"] = {"path": str(args.against), **compare(other, stat, seed=args.seed)}
    if args.csv:
        write_csv(args.csv, result)
    if args.per_image:
        write_image_csv(args.per_image, result)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.page:
        _write_page(args, result, pair, other_pair)
    stream = report_stream(files.values())
    print(format_table(result), file=stream)
    if args.against:
        print(format_comparison(result["against"], str(args.against), str(args.pred_json)), file=stream)
    print(f"{result['images']} images in {result['seconds']:.2f} s on {result['threads']} threads", file=stream)
    for name, path in files.items():
        if path:
            print(f"{name}: {path}", file=stream)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if min(args.worst, args.random) < 0 or args.worst + args.random == 0:
        raise ArgumentError(
            f"--worst {args.worst} --random {args.random}: neither may be negative, and one must be above 0"
        )
    if args.seed < 0:
        raise ArgumentError(f"--seed {args.seed}: not negative")
    for option, needed in (("images", "page"), ("table", "by"), ("against_folder", "against")):
        if getattr(args, option) is not None and getattr(args, needed) is None:
            raise ArgumentError(f"--{option.replace('_', '-')} needs --{needed}: add it")


def _write_page(args: argparse.Namespace, result: dict[str, Any], pair: Any, other: Any) -> None:
    from ldmseg_fast.reports.error_files import write_page_of_changes, write_page_of_files

    if other is not None:
        write_page_of_changes(args.page, result["against"], other, pair, args.images, most=max(1, args.worst))
        return
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


def _inputs(args: argparse.Namespace) -> list[Path]:
    """Lists the files and folders that are read; what is missing is told later."""
    from ldmseg_fast.metrics.sources import png_folder
    from ldmseg_fast.panoptic.splits import picture_folder

    inputs = [path for path in (args.gt_json, args.pred_json, args.against, args.table) if path is not None]
    sides = (
        (args.gt_json, args.gt_folder),
        (args.pred_json, args.pred_folder),
        (args.against, args.against_folder),
    )
    for path, folder in sides:
        with contextlib.suppress(PanopticFormatError):
            inputs += [png_folder(path, folder)] if path is not None else []
    pictures = args.images or picture_folder(args.gt_json)
    return inputs if pictures is None else [*inputs, pictures]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
