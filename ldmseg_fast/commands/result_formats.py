"""Adds `--format KIND` to commands that write results: the same results in other formats, in OUT/KIND."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ldmseg_fast.errors import ArgumentError

if TYPE_CHECKING:
    from ldmseg_fast.data.picture_folders import FoundPicture
    from ldmseg_fast.pipeline import LDMSegPipeline

_NEEDS_CATEGORIES = "cityscapes-results"  # it holds nothing of a map whose segments are objects and no more


def add_format_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --format."""
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        dest="formats",
        metavar="KIND",
        help="write the results in this format too, into OUT/KIND; may be repeated (`ldmseg data export --help`)",
    )


def check_formats(kinds: Sequence[str], pictures: Sequence[FoundPicture], out: Path, *, local: bool = False) -> None:
    """Checks before anything is predicted that the results can be written in these formats.

    local: the results are on the disks of several machines.

    Raises:
        ArgumentError: no such format, one that is not written, one that is named twice, or a folder of results that is
            called like it.
        DataError: OUT/KIND is there already.
    """
    if not kinds:
        return
    from ldmseg_fast.data.shards import ShardPicture
    from ldmseg_fast.formats.export import check_free, writer_of  # late: few ask for it

    if local:
        raise ArgumentError(f"--format {kinds[0]}: needs all results in one folder; leave --share out")
    if shard := next((picture for picture in pictures if isinstance(picture, ShardPicture)), None):
        raise ArgumentError(
            f"--format {kinds[0]}: other formats name pictures that are files; unpack {shard.source()}, or leave it out"
        )
    for place, kind in enumerate(kinds):
        writer_of(kind)
        if kind in kinds[:place]:
            raise ArgumentError(f"--format {kind}: named twice")
        check_free(out / kind)
        for picture in pictures:
            if picture.folder.parts[:1] == (kind,):
                raise ArgumentError(
                    f"--format {kind}: {picture.file} has its results in {out / kind}; rename its folder"
                )


def check_categories(kinds: Sequence[str], pipe: LDMSegPipeline) -> None:
    """Checks before anything is predicted that the model gives what these formats need.

    Raises:
        ArgumentError: a format that needs categories, and a model without.
    """
    if _NEEDS_CATEGORIES in kinds and getattr(pipe.info, "categories", None) is None:
        raise ArgumentError(
            f"--format {_NEEDS_CATEGORIES}: needs Cityscapes' categories, and this model has none; export the results "
            "of `ldmseg evaluate --class-aware`"
        )


def write_formats(
    kinds: Sequence[str], pictures: Sequence[FoundPicture], out: Path, *, exif: bool, stream: IO[str]
) -> None:
    """Writes results of `ldmseg predict` in other formats, and prints what each holds.

    Args:
        kinds: that `check_formats` has passed.
        pictures: that have results.
        out: the folder of the results.
        exif: whether pictures were turned as their EXIF orientation says.
        stream: what is printed goes there.

    Raises:
        DataError: results that have gone, or that the format cannot hold.
        OSError: a file that cannot be written.
    """
    if not kinds or not pictures:
        return
    from ldmseg_fast.formats.coco_panoptic_reader import read_predictions
    from ldmseg_fast.formats.export import export
    from ldmseg_fast.formats.options import WriteOptions

    data_set = read_predictions(out, pictures, exif=exif)
    for kind in kinds:
        print(f"{kind}: {export(data_set, kind, out / kind, WriteOptions()).text()}", file=stream)
