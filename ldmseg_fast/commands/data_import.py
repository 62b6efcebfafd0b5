"""`ldmseg data import` makes a COCO-panoptic folder of a data set in another format."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import asdict, replace
from pathlib import Path

from ldmseg_fast.commands.options import add_json_argument, print_json
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.files import real_path
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions


def import_data(kind: str, source: Path, out: Path, options: ReadOptions, written: WriteOptions) -> Summary:
    """Reads a data set and writes it as a COCO-panoptic folder, see `formats.coco_panoptic_writer.write`.

    Args:
        kind: of `KINDS`.
        source: a folder or file, or what else the kind's reader takes.
        out: lies outside of the source.
        options: for the reader.
        written: for the writer; its `origin` is set here.

    Raises:
        ArgumentError: no such kind, or OUT lies in the source.
        DataError: the source cannot be read, or not all of it, or a split that it does not have.
        OSError: a file that cannot be written.
    """
    from ldmseg_fast.formats.coco_panoptic_writer import write  # late, with all that decoding needs
    from ldmseg_fast.formats.instances import with_options
    from ldmseg_fast.outputs import check_outputs

    if kind not in KINDS or not KINDS[kind].reads:
        known = ", ".join(name for name, each in KINDS.items() if each.reads)
        raise ArgumentError(f"{kind}: no kind of data set that is read; known are {known}")
    check_outputs({}, {"OUT": out}, inputs=[source] if source.exists() else [])
    reader = importlib.import_module(f"ldmseg_fast.formats.{KINDS[kind].module}")
    data_set = _chosen(reader.read(source, options), options, source)
    if not data_set.categories:
        raise DataError(f"{source}: nothing in it is labelled with a category; label it, and export it again")
    origin = f"{kind} {real_path(source) if source.exists() else source} {replace(options, splits=())}"
    return write(with_options(data_set, options), out, replace(written, origin=origin))


def _chosen(data_set: DataSet, options: ReadOptions, source: Path) -> DataSet:
    """Leaves the splits that are asked for; a reader may have read others."""
    return replace(
        data_set, splits={split: data_set.splits[split] for split in options.chosen(data_set.splits, source)}
    )


EXAMPLES = (
    "ldmseg data import cityscapes CITYSCAPES cityscapes-panoptic --split val",
    "ldmseg data import voc VOC2012 voc-panoptic --json > summary.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    titles = "\n".join(f"  {name:<16} {kind.title}" for name, kind in KINDS.items() if kind.reads)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"kinds:\n{titles}"
    parser.add_argument("kind", metavar="KIND", choices=[name for name, kind in KINDS.items() if kind.reads])
    parser.add_argument("source", metavar="SRC", type=Path, help="what is imported; it stays as it is")
    parser.add_argument("out", metavar="OUT", type=Path, help="COCO-panoptic folder; it may hold other splits")
    parser.add_argument("--split", metavar="NAME", nargs="+", action="extend", help="splits to import; default: all")
    parser.add_argument("--copy", action="store_true", help="copy pictures; otherwise they are links to SRC")
    parser.add_argument(
        "--connected",
        metavar="CLASS,...",
        action="append",
        help="categories, by name or id, whose connected pieces are instances",
    )
    parser.add_argument(
        "--things", metavar="CLASS,...", action="append", help="categories that are things; all others are stuff"
    )
    parser.add_argument("--version", default="", help="of the format, where SRC has several")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read instead of ending")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what was imported and left out; returns 1 where pictures that could not be read were left out."""
    options = ReadOptions(tuple(args.split or ()), tuple(args.connected or ()), tuple(args.things or ()), args.version)
    summary = import_data(
        args.kind, args.source, args.out, options, WriteOptions(copy=args.copy, skip_bad=args.skip_bad)
    )
    if args.json:
        print_json(asdict(summary))
    else:
        print(summary.text())
    return 1 if summary.faults else 0
