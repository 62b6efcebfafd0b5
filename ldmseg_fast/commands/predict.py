"""`ldmseg predict` segments pictures on disk: map PNG, overlay PNG and JSON beside each other."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldmseg_fast.commands.options import add_backend_arguments, model_folders
from ldmseg_fast.data.folders import read_image
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import replacing
from ldmseg_fast.inference.ensemble import EnsembleResult
from ldmseg_fast.outputs import check_outputs, check_replaced
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.pipeline import LDMSegPipeline
from ldmseg_fast.reports.draw import enlarge, overlay

OVERLAY_SIDE = 2048
SMALL_SIDE = 512  # overlays of small pictures are enlarged to about this side
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """Lists files as they are and folders as the pictures in them (but hidden ones), each once.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (file for file in path.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
            inside = sorted(file for file in files if not file.name.startswith("."))
            if not inside:
                raise FileNotFoundError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def check_results(files: Sequence[Path], out: Path, keep: Sequence[Path] = ()) -> None:
    """Checks that no result of `files` in the folder `out` replaces something.

    Raises:
        ArgumentError: results would replace each other, one of the files, or one of those to `keep`.
    """
    folder = out.resolve()
    pictures = {file.name: file for file in (*files, *keep) if file.parent.resolve() == folder}
    names: dict[str, Path] = {}
    for file in files:
        for ending in (".png", "_overlay.png", "_agreement.png", ".json"):
            name = file.stem + ending
            other = names.setdefault(name, file)
            if other != file:
                raise ArgumentError(
                    f"{file} and {other} would both be written as {name}; segment them into two folders"
                )
            if name in pictures:
                raise ArgumentError(f"{pictures[name]} would be replaced by the result of {file}; choose another --out")
    check_replaced(map(out.joinpath, names), (*files, *keep))


def image_id(file: Path) -> str:
    """Returns what a picture's noise is drawn by: its name without the ending, which need not be text."""
    return os.fsencode(file.stem).decode("utf-8", "backslashreplace")


def save_overlay(path: Path, image: np.ndarray, segmentation: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], and its map, int32 [H, W], as one PNG for the eye.

    It is at most OVERLAY_SIDE pixels long. Pixels of small pictures are enlarged, or their segments' edges would hide
    them.
    """
    longest = max(segmentation.shape)
    if longest > OVERLAY_SIDE:
        height, width = (max(1, round(side * OVERLAY_SIDE / longest)) for side in segmentation.shape)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
        segmentation = np.asarray(Image.fromarray(segmentation).resize((width, height), Image.Resampling.NEAREST))
    else:
        image, segmentation = enlarge(image, SMALL_SIDE), enlarge(segmentation, SMALL_SIDE)
    _save_png(path, overlay(image, segmentation))


def write_result(out: Path, file: Path, image: np.ndarray, result: PanopticResult) -> Path:
    """Writes a result beside its picture: OUT/NAME.png, OUT/NAME_overlay.png and OUT/NAME.json.

    OUT/NAME.png holds the ids as COCO colours. An ensemble's result also gets OUT/NAME_agreement.png.

    Args:
        out: a folder that is there.
        file: the picture, whose name without the ending is NAME.
        image: the picture, uint8 [H, W, 3].
        result: its map, int32 [H, W], and segments.

    Returns:
        The JSON.
    """
    write_panoptic_png(out / f"{file.stem}.png", result.segmentation)
    save_overlay(out / f"{file.stem}_overlay.png", image, result.segmentation)
    height, width = result.segmentation.shape
    record: dict[str, Any] = {
        "image": file.name,
        "file_name": f"{file.stem}.png",
        "height": height,
        "width": width,
        "segments_info": result.segments_info,
    }
    if isinstance(result, EnsembleResult):
        agreement = np.rint(255.0 * result.agreement).astype(np.uint8)
        _save_png(out / f"{file.stem}_agreement.png", agreement)
        record["agreement_file_name"] = f"{file.stem}_agreement.png"
    path = out / f"{file.stem}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _save_png(path: Path, picture: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")


def predict_files(
    pipe: LDMSegPipeline,
    files: Sequence[Path],
    out: Path,
    num_inference_steps: int | None,
    seed: int,
    batch_size: int,
    samples: int = 1,
    **sampling: Any,
) -> list[Path]:
    """Segments `files` and writes OUT/NAME.png (ids as COCO colours), OUT/NAME_overlay.png and OUT/NAME.json each.

    The overlay is scaled down to OVERLAY_SIDE pixels where the picture is larger.

    With several `samples` the map is an ensemble's (`LDMSegPipeline.ensemble`), and OUT/NAME_agreement.png shows how
    far they agree on each pixel, 255 where all do. `sampling` goes to the pipeline.

    Returns:
        The JSON files.

    Raises:
        DataError: a file that is no readable picture, named.
        ArgumentError: results that would replace each other or a picture; a batch_size below 1.
    """
    if batch_size < 1:
        raise ArgumentError(f"--batch-size {batch_size}: at least 1")
    check_results(files, out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    progress = tqdm(total=len(files), desc="predict", unit="image", disable=None)
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        images = [read_image(file) for file in chunk]
        ids = [image_id(file) for file in chunk]
        settings: dict[str, Any] = {"seed": seed, "image_ids": ids, "batch_size": batch_size, **sampling}
        results: list[Any]
        if samples != 1:
            results = pipe.ensemble(images, samples, num_inference_steps=num_inference_steps, **settings)
        else:
            results = list(pipe(images, num_inference_steps, **settings))
        for file, image, result in zip(chunk, images, results):
            written.append(write_result(out, file, image, result))
        progress.update(len(chunk))
    progress.close()
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir")
    parser.add_argument("images", nargs="+", help="files or folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="seeds per picture; above 1 with a map of agreement")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the DDIM solver, 0 to 1")
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    parser.add_argument(
        "--cache-interval", type=int, default=1, metavar="N", help="compute deep features every N steps only"
    )
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Segments the pictures and returns 0."""
    check_outputs({}, {"--out": args.out}, roots=[*model_folders(args.model_dir), args.engine_dir])
    files = find_pictures(args.images)
    pipe = LDMSegPipeline.from_pretrained(
        args.model_dir, args.backend, args.engine_dir, image_size=args.size, cuda_graph=args.cuda_graph
    )
    sampling = {"solver": args.solver, "eta": args.eta, "cache_interval": args.cache_interval}
    written = predict_files(pipe, files, args.out, args.steps, args.seed, args.batch_size, args.samples, **sampling)
    print(f"{len(written)} images segmented: {args.out}")
    return 0
