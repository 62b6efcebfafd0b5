"""`ldmseg data export` writes a COCO-panoptic folder, or a file of results, in another format."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ldmseg_fast.commands.options import add_json_argument, print_json
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.formats.kinds import KINDS

SHAPED = ("coco-instances", "labelme", "label-studio")  # kinds that hold masks or polygons


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --shape."""
    parser.add_argument(
        "--shape", choices=("rle", "polygon"), help=f"of a segment, in {', '.join(SHAPED)}; default rle, a mask"
    )


def check_shape(kinds: list[str], shape: str | None) -> None:
    """Checks that a format has the choice of --shape.

    Raises:
        ArgumentError: none of them has.
    """
    if shape is not None and not set(kinds) & set(SHAPED):
        raise ArgumentError(f"--shape: {', '.join(kinds)} has no choice of shapes; {', '.join(SHAPED)} have")


EXAMPLES = (
    "ldmseg data export coco-instances scenes scenes-instances --split val2017",
    "ldmseg data export label-studio results.json tasks --pictures pictures",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    written = ", ".join(kind for kind, each in KINDS.items() if each.writes)
    parser.add_argument("kind", metavar="KIND", help=written)
    parser.add_argument("root", metavar="ROOT", type=Path, help="COCO-panoptic folder, or the JSON of results")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--split", metavar="NAME", nargs="+", action="extend", help="splits to export; default all")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="pictures of results, where ROOT is their JSON")
    parser.add_argument("--copy", action="store_true", help="copy pictures; default links to them")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures whose map cannot be read")
    add_shape_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what was exported and left out; returns 1 where pictures that could not be read were left out."""
    from ldmseg_fast.formats.coco_panoptic_reader import read, read_results  # late, with all that decoding needs
    from ldmseg_fast.formats.export import check_free, export, writer_of
    from ldmseg_fast.formats.options import ReadOptions, WriteOptions
    from ldmseg_fast.outputs import check_outputs

    writer_of(args.kind)
    check_shape([args.kind], args.shape)
    splits = tuple(dict.fromkeys(args.split or ()))
    if args.root.is_file():
        if args.pictures is None:
            raise ArgumentError(f"{args.root}: --pictures DIR must say where the pictures of these results are")
        if splits:
            raise ArgumentError(f"--split: {args.root} is a file of results, which has no splits")
    elif args.pictures is not None:
        raise ArgumentError("--pictures is for the JSON of results; a COCO-panoptic folder has its own")
    if not args.root.exists():
        raise DataError(f"{args.root}: no such folder")
    maps = args.root.with_suffix("") if args.root.is_file() else None
    check_outputs({}, {"OUT": args.out}, inputs=[args.root, args.pictures, maps])
    check_free(args.out)
    if args.pictures is not None:
        data_set = read_results(args.root, args.pictures)
    else:
        data_set = read(args.root, ReadOptions(splits=splits))
    options = WriteOptions(copy=args.copy, shape=args.shape or "rle", skip_bad=args.skip_bad)
    summary = export(data_set, args.kind, args.out, options)
    if args.json:
        print_json(asdict(summary))
    else:
        print(summary.text())
    return 1 if summary.faults else 0
