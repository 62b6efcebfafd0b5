"""`ldmseg predict` segments pictures on disk: map PNG, overlay PNG and JSON beside each other."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldmseg_fast.commands.options import (
    add_backend_arguments,
    add_json_argument,
    add_model_argument,
    add_picture_arguments,
    add_view_arguments,
    model_folders,
    print_json,
    take_model,
    views_of,
)
from ldmseg_fast.commands.result_formats import add_format_argument, check_categories, check_formats, write_formats
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.picture_folders import FoundPicture, described, find_pictures
from ldmseg_fast.data.pictures import MAX_PIXELS, Picture, read_picture
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.files import replacing
from ldmseg_fast.inference.ensemble import EnsembleResult
from ldmseg_fast.inference.inputs import scaled_picture
from ldmseg_fast.outputs import check_outputs, check_replaced
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.pipeline import LDMSegPipeline
from ldmseg_fast.reports.draw import enlarge, overlay
from ldmseg_fast.reports.labels import named_overlay

OVERLAY_SIDE = 2048
LONGEST_NAME = 255  # bytes
SMALL_SIDE = 512  # overlays of small pictures are enlarged to about this side


@dataclass
class Predicted:
    """Says what became of the pictures.

    Attributes:
        written: the JSON files.
        bad: an error for each picture that could not be read.
        turned: how many were turned as their EXIF orientation says.
        frames: how many have more frames than the one that was segmented.
    """

    written: list[Path] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    turned: int = 0
    frames: int = 0


def check_results(pictures: Sequence[FoundPicture], out: Path, keep: Sequence[Path] = ()) -> None:
    """Checks that no result of `pictures` in the folder `out` replaces something.

    Raises:
        ArgumentError: results would replace each other, one of the pictures, or one of the files to `keep`, or have
            names that no file system takes.
    """
    folder = out.resolve()
    inputs = {file.resolve(): file for file in (*(picture.file for picture in pictures), *keep)}
    names: dict[Path, Path] = {}
    for picture in pictures:
        for ending in (".png", "_overlay.png", "_agreement.png", ".json"):
            name = picture.folder / (picture.file.stem + ending)
            if len(os.fsencode(name.name)) > LONGEST_NAME:
                raise ArgumentError(
                    f"{picture.file}: the name of its result, {name.name[:20]}...{ending}, has over {LONGEST_NAME} "
                    "bytes, which file systems do not take; rename the picture"
                )
            other = names.setdefault(name, picture.file)
            if other != picture.file:
                raise ArgumentError(
                    f"{picture.file} and {other} would both be written as {name}; segment them into two folders"
                )
            if folder / name in inputs:
                raise ArgumentError(
                    f"{inputs[folder / name]} would be replaced by the result of {picture.file}; choose another --out"
                )
    check_replaced(map(out.joinpath, names), (*(picture.file for picture in pictures), *keep))


def image_id(file: Path) -> str:
    """Returns what a picture's noise is drawn by: its name without the ending, which need not be text."""
    return os.fsencode(file.stem).decode("utf-8", "backslashreplace")


def preview_of(picture: Picture) -> np.ndarray:
    """Scales a picture down to what an overlay shows: uint8 [h, w, 3], at most OVERLAY_SIDE pixels long."""
    height, width = picture.size
    longest = max(height, width)
    if longest <= OVERLAY_SIDE:
        return np.asarray(picture.pixels)
    height, width = (max(1, round(side * OVERLAY_SIDE / longest)) for side in (height, width))
    pixels = picture.pixels if isinstance(picture.pixels, Image.Image) else Image.fromarray(picture.pixels)
    return np.asarray(pixels.resize((width, height), Image.Resampling.BOX))


def save_overlay(
    path: Path, preview: np.ndarray, result: PanopticResult, categories: CategoryTable | None = None
) -> None:
    """Writes a picture, uint8 [h, w, 3] of `preview_of`, and its map, int32 [H, W], as one PNG for the eye.

    Pixels of small pictures are enlarged, or their segments' edges would hide them. Of a model with categories it has
    names on the segments and a legend.
    """
    segmentation = result.segmentation
    height, width = preview.shape[:2]
    if segmentation.shape == (height, width):
        preview, segmentation = enlarge(preview, SMALL_SIDE), enlarge(segmentation, SMALL_SIDE)
    else:
        rows, columns = (
            ((np.arange(few) + 0.5) * (many / few)).astype(np.intp)
            for few, many in zip((height, width), segmentation.shape)
        )
        segmentation = segmentation[rows[:, None], columns]
    if categories is None:
        _save_png(path, overlay(preview, segmentation))
    else:
        _save_png(path, named_overlay(preview, segmentation, result.segments_info, categories))


def write_result(
    out: Path,
    picture: FoundPicture,
    preview: np.ndarray,
    result: PanopticResult,
    categories: CategoryTable | None = None,
) -> Path:
    """Writes a picture's result: NAME.png, NAME_overlay.png and NAME.json in its folder below OUT.

    NAME.png holds the ids as COCO colours. An ensemble's result also gets NAME_agreement.png.

    Args:
        out: the folder of all results.
        picture: whose name without the ending is NAME.
        preview: the picture, uint8 [h, w, 3] of `preview_of`.
        result: its map, int32 [H, W], and segments.
        categories: of models with categories.

    Returns:
        The JSON.

    Raises:
        OSError: names the file that cannot be written.
    """
    folder, stem = out / picture.folder, picture.file.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_panoptic_png(folder / f"{stem}.png", result.segmentation)
    save_overlay(folder / f"{stem}_overlay.png", preview, result, categories)
    height, width = result.segmentation.shape
    record: dict[str, Any] = {
        "image": picture.file.name,
        "file_name": f"{stem}.png",
        "height": height,
        "width": width,
        "segments_info": result.segments_info,
    }
    if isinstance(result, EnsembleResult):
        agreement = np.rint(255.0 * result.agreement).astype(np.uint8)
        _save_png(folder / f"{stem}_agreement.png", agreement)
        record["agreement_file_name"] = f"{stem}_agreement.png"
    path = folder / f"{stem}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _save_png(path: Path, picture: np.ndarray) -> None:
    buffer = io.BytesIO()  # Pillow's own error does not tell a full disk from another fault
    Image.fromarray(picture).save(buffer, "PNG")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def predict_files(
    pipe: LDMSegPipeline,
    pictures: Sequence[FoundPicture],
    out: Path,
    num_inference_steps: int | None,
    seed: int,
    batch_size: int,
    samples: int = 1,
    *,
    views: Mapping[str, Any] = MappingProxyType({}),
    exif: bool = True,
    **sampling: Any,
) -> Predicted:
    """Segments `pictures` and writes their results as `write_result` does; those that cannot be read are left out.

    The overlay is scaled down to OVERLAY_SIDE pixels where the picture is larger.

    With several `samples`, or with `views` (its `flip`, `scales` and `fusion`), the map is an ensemble's
    (`LDMSegPipeline.ensemble`), and OUT/NAME_agreement.png shows how
    far they agree on each pixel, 255 where all do. `sampling` goes to the pipeline.

    Raises:
        ArgumentError: results that would replace each other or a picture; what the pipeline refuses.
        OSError: names the file that cannot be written.
    """
    check_results(pictures, out)
    out.mkdir(parents=True, exist_ok=True)
    done = Predicted()
    with tqdm(total=len(pictures), desc="predict", unit="image", disable=None) as progress:
        for batch in _read_batches(pipe, pictures, batch_size, exif, done, progress, views):
            ids = [image_id(found.file) for found, _, _ in batch]
            settings: dict[str, Any] = {"seed": seed, "image_ids": ids, "batch_size": batch_size, **sampling}
            images = [picture for _, picture, _ in batch]
            results: list[Any]
            if samples != 1 or views:
                results = pipe.ensemble(images, samples, num_inference_steps=num_inference_steps, **settings, **views)
            else:
                results = list(pipe(images, num_inference_steps, **settings))
            for (found, _, preview), result in zip(batch, results):
                done.written.append(write_result(out, found, preview, result, pipe.info.categories))
            progress.update(len(batch))
    return done


def _read_batches(
    pipe: LDMSegPipeline,
    pictures: Sequence[FoundPicture],
    batch_size: int,
    exif: bool,
    done: Predicted,
    progress: Any,
    views: Mapping[str, Any],
) -> Iterator[list[tuple[FoundPicture, Picture, np.ndarray]]]:
    """Yields batches of pictures at the network's size, with their previews, whose maps fit the memory together."""
    batch: list[tuple[FoundPicture, Picture, np.ndarray]] = []
    pixels = 0
    largest = max((1.0, *views.get("scales", ())))
    for found in pictures:
        try:
            picture = read_picture(found.file, exif=exif, max_pixels=pipe.max_pixels)
        except DataError as error:
            done.bad.append(str(error))
            progress.update(1)
            continue
        done.turned += picture.turned
        done.frames += picture.frames
        height, width = picture.size
        if batch and (len(batch) == batch_size or pixels + height * width > MAX_PIXELS):
            yield batch
            batch, pixels = [], 0
        pixels += height * width
        side = round(pipe.info.picture_size * largest)
        scaled = scaled_picture(picture, 0, side, exif=exif, max_pixels=pipe.max_pixels)
        batch.append((found, scaled, preview_of(picture)))
        del picture  # or it would wait in memory while its batch is segmented
    if batch:
        yield batch


EXAMPLES = (
    "ldmseg predict tiny photo.png --out results",
    "ldmseg predict tiny pictures --recursive --out results --steps 4 --format coco-panoptic",
    "ldmseg predict MODEL_DIR pictures --out results --backend onnxruntime --engine-dir graphs",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("images", nargs="+", help="files or folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    add_format_argument(parser)
    add_json_argument(parser)
    parser.add_argument("--recursive", action="store_true", help="take the pictures of sub-folders too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="seeds per picture; above 1 with a map of agreement")
    add_view_arguments(parser)
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the DDIM solver, 0 to 1")
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    parser.add_argument(
        "--cache-interval", type=int, default=1, metavar="N", help="compute deep features every N steps only"
    )
    add_picture_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Segments the pictures. Returns 0, or 1 where some of them could not be read.

    Raises:
        DataError: the files that were named, if none of them could be read.
    """
    take_model(args)
    check_outputs({}, {"--out": args.out}, roots=[*model_folders(args.model_dir), args.engine_dir])
    found = find_pictures(args.images, recursive=args.recursive, out=args.out)
    check_results(found.pictures, args.out)
    check_formats(args.formats, found.pictures, args.out)
    pipe = LDMSegPipeline.from_pretrained(
        args.model_dir, args.backend, args.engine_dir, image_size=args.size, cuda_graph=args.cuda_graph
    )
    check_categories(args.formats, pipe)
    pipe.max_pixels = args.max_pixels
    sampling = {"solver": args.solver, "eta": args.eta, "cache_interval": args.cache_interval, "exif": args.exif}
    done = predict_files(
        pipe,
        found.pictures,
        args.out,
        args.steps,
        args.seed,
        args.batch_size,
        args.samples,
        views=views_of(args),
        **sampling,
    )
    if not done.written and not found.from_folders:
        raise DataError("\n".join(done.bad))
    stream = sys.stderr if args.json else sys.stdout
    print(f"{len(done.written)} images segmented: {args.out}", file=stream)
    written = set(done.written)
    results = [each for each in found.pictures if args.out / each.folder / f"{each.file.stem}.json" in written]
    write_formats(args.formats, results, args.out, exif=args.exif, stream=stream)
    if done.turned:
        turned = f"{done.turned} turned as their EXIF orientation says (--keep-orientation keeps the stored pixels)"
        print(turned, file=stream)
    if done.frames:
        print(f"{done.frames} have more than one frame, of which the first is segmented", file=stream)
    if found.left_out:
        print(f"left out: {described(found.left_out)}", file=stream)
    if done.bad:
        print(f"{len(done.bad)} could not be segmented:", *done.bad, sep="\n  ", file=sys.stderr)
    if args.json:
        print_json(asdict(done) | {"left_out": found.left_out})
    return 1 if done.bad else 0
