"""Adds the options that several commands share, and holds every number of a command line to its range."""

from __future__ import annotations

import argparse

from ldmseg_fast.config.limits import Range
from ldmseg_fast.errors import ArgumentError

# What a number may be, by the option's name, in every command that has it. Upper ends are far beyond any use; they
# catch a slip before it allocates memory or starts processes.
RANGES = {
    "agreement": Range(0, 10**9),
    "autoencoder_steps": Range(0, 10**9),
    "batch_size": Range(1, 4096),
    "block": Range(1, 16384),
    "cache_interval": Range(1, 10**6),
    "count_th": Range(0, 2**30),
    "diffusion_steps": Range(0, 10**9),
    "images": Range(0, 10**7),
    "limit": Range(0, 10**9),
    "max_pixels": Range(1, 2**28),
    "minutes": Range(0, 10**6),
    "overlap_th": Range(0, 1),
    "mask_th": Range(0, 1),
    "probability": Range(0, 1),
    "random": Range(0, 10**4),
    "ranks": Range(0, 1024),
    "samples": Range(0, 1000),
    "scenes": Range(0, 10**7),
    "seed": Range(0, 2**63 - 1),
    "seeds": Range(1, 1000),
    "size": Range(1, 16384),
    "steps": Range(1, 10**6),
    "threads": Range(1, 1024),
    "timeout": Range(0.01, 10**7),
    "unknown_id": Range(0, 2**24 - 1),
    "workers": Range(0, 256),
    "worst": Range(0, 10**4),
}


def check_ranges(args: argparse.Namespace) -> None:
    """Checks every number of a command line against RANGES.

    Raises:
        ArgumentError: names the first option that is out of range.
    """
    for name, value in vars(args).items():
        limit = RANGES.get(name)
        for number in value if isinstance(value, list) else [value]:
            if limit is not None and isinstance(number, (int, float)) and not limit.admits(number):
                raise ArgumentError(f"--{name.replace('_', '-')} {number}: {limit} expected")


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --backend, --engine-dir, --no-cuda-graph, --steps, --batch-size and --solver."""
    parser.add_argument("--backend", default="torch", help="torch, compile, onnxruntime or tensorrt")
    parser.add_argument("--engine-dir", help="exported graphs or engines")
    parser.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_const",
        const=False,
        help="run the sampling loop on a GPU step by step, not as one CUDA graph",
    )
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--solver", default="ddim", help="ddim, dpmpp_2m or heun")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --keep-orientation and --max-pixels."""
    parser.add_argument(
        "--keep-orientation",
        dest="exif",
        action="store_false",
        help="take the pixels as they are stored, as COCO's maps do; default as the EXIF orientation shows them",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=2**26,
        metavar="N",
        help="refuse larger pictures before they are decoded (default 67108864)",
    )
