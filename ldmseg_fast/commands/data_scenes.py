"""`ldmseg data scenes` generates pictures with panoptic maps, the same bytes for the same seed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, required=True, help="training scenes; a tenth more for validation")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="also write a 10x10 contact sheet")


def run(args: argparse.Namespace) -> int:
    from ldmseg_fast.data.scenes import write_scenes

    write_scenes(args.out, args.images, args.size, args.seed)
    if args.sheet:
        from ldmseg_fast.reports.draw import contact_sheet

        contact_sheet(args.out, "train2017").save(args.sheet)
    print(f"scenes: {args.out}")
    return 0
