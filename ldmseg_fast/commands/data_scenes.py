"""`ldmseg data scenes` generates pictures with panoptic maps, the same bytes for the same seed."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldmseg_fast.errors import ArgumentError

EXAMPLES = ("ldmseg data scenes scenes --images 4000 --size 64 --version 1",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, required=True, help="training scenes; a tenth more for validation")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--version", type=int, default=2, help="of the painter: 1 has 14 kinds, 2 (default) 19 that look different"
    )
    parser.add_argument("--sheet", type=Path, help="also write a 10x10 contact sheet")


def picture_format(path: Path) -> str:
    """Returns Pillow's name of the format that a file's ending means; PNG where it has none.

    Raises:
        ArgumentError: no such format.
    """
    from PIL import Image

    Image.init()
    known = Image.registered_extensions().get(path.suffix.lower()) if path.suffix else "PNG"
    if known not in Image.SAVE:
        raise ArgumentError(f"--sheet {path}: no format for pictures has the ending {path.suffix}; name it .png")
    return known


def run(args: argparse.Namespace) -> int:
    from ldmseg_fast.data.scenes import RECORD, SPLITS, write_scenes
    from ldmseg_fast.files import check_output, replacing
    from ldmseg_fast.outputs import check_outputs

    names = [f"{kind}{split}" for kind in ("", "panoptic_") for split in SPLITS]
    check_outputs({"--sheet": args.sheet}, inputs=[args.out / name for name in ("annotations", RECORD, *names)])
    if args.sheet:
        kind = picture_format(args.sheet)
        check_output(args.sheet)
    write_scenes(args.out, args.images, args.size, args.seed, version=args.version)
    if args.sheet:
        from ldmseg_fast.reports.draw import contact_sheet

        with replacing(args.sheet) as temporary:
            contact_sheet(args.out, "train2017").save(temporary, format=kind)
    print(f"scenes: {args.out}")
    return 0
