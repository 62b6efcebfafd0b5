"""Reads the command line of a benchmark, and refuses before any work what could only fail, or mislead, after it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ldmseg_fast.config.limits import OPTION_RANGES, Range, check_ranges
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.outputs import check_writable

RANGES = OPTION_RANGES | {
    "agreement": Range(2, 1000),
    "batch": Range(1, 2**20),
    "cell": Range(1, 16384),
    "clients": Range(1, 1024),
    "cores": Range(1, 4096),
    "gpus": Range(1, 2**20),
    "images": Range(1, 10**6),
    "jobs": Range(1, 1024),
    "mask_th": Range(0, 1),
    "micro_batch": Range(1, 2**20),
    "minutes": Range(0.0001, 10**6),
    "processes": Range(1, 256),
    "requests": Range(1, 10**7),
    "rounds": Range(1, 10**6),
    "rows": Range(1, 10**6),
    "share": Range(0.001, 1),
    "sm": Range(70, 200),
    "tuning_images": Range(1, 10**6),
}
SIDE = Range(1, 16384)


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line, and checks its numbers, its device, and that results can be written to --out.

    Raises:
        ArgumentError: a number that is out of range, or a device that is not there.
        OSError: names a folder of --out that takes no files.
    """
    args = parser.parse_args(argv)
    check_options(args)
    return args


def check_options(args: argparse.Namespace) -> None:
    """Checks what `parse_options` does, of options that have been parsed."""
    check_ranges(args, RANGES)
    out = getattr(args, "out", None)
    if out is not None and not out.suffix:  # else a picture
        check_writable(out)
    if getattr(args, "device", "") == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: no CUDA device here; use --device cpu")


def sides(text: str) -> str:
    """Checks the size of a picture, HEIGHTxWIDTH in pixels; an argument's type.

    Raises:
        ArgumentTypeError: the text is no size, or out of range.
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(each.isascii() and each.isdigit() and SIDE.admits(int(each)) for each in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: HEIGHTxWIDTH expected, each side {SIDE} pixels, as 480x640")
    return text


def refuse_unused(args: argparse.Namespace, parser: argparse.ArgumentParser, why: str, *names: str) -> None:
    """Refuses options that were given and would do nothing.

    Args:
        why: says what leaves them without effect.
        names: of the options, as `batch_size`.

    Raises:
        ArgumentError: names the first of them.
    """
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: does nothing, {why}; leave it out")
