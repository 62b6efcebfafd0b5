"""Adds the options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldmseg_fast.errors import CheckpointError, DataError
from ldmseg_fast.files import read_text


def model_folders(model_dir: str | Path) -> list[Path]:
    """Lists a model folder and those of its components, which no command may write into; none where it is not there."""
    from ldmseg_fast.checkpoints.model_folder import COMPONENTS
    from ldmseg_fast.checkpoints.shipped import resolve_model_dir

    try:
        model = resolve_model_dir(model_dir)
    except CheckpointError:  # it is told when the model is loaded
        return []
    return [model, *(model / name for name in COMPONENTS)]


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --backend, --engine-dir, --no-cuda-graph, --steps, --batch-size, --solver and --threads."""
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
    parser.add_argument("--threads", type=int, help="of this process; default its share of the machine's cores")


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --recursive and --share, of commands over many pictures."""
    parser.add_argument("--recursive", action="store_true", help="take the pictures of sub-folders too")
    parser.add_argument(
        "--share",
        type=Path,
        metavar="DIR",
        help="folder that all ranks see, where --out is on each machine's own disk; default --out",
    )


def lists_among(paths: Sequence[str]) -> list[Path]:
    """Returns the text files among paths: FILE of each @FILE, unless a file is called so."""
    return [Path(path[1:]) for path in paths if path.startswith("@") and not Path(path).exists()]


def listed(paths: Sequence[str]) -> list[str]:
    """Returns paths with those that a text file names, one a line, in the place of its @FILE.

    Raises:
        DataError: a list that is no text, or names nothing.
        OSError: a list that cannot be read.
    """
    named: list[str] = []
    for path in paths:
        if not lists_among([path]):
            named.append(path)
            continue
        try:
            lines = [line for line in read_text(path[1:], DataError, "list of paths").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path[1:]}: no text in UTF-8 ({error}); write one path a line") from None
        if not lines:
            raise DataError(f"{path[1:]}: names no picture; write one path a line")
        named += lines
    return named


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
