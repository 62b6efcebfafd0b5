"""`ldmseg predict` segments pictures on disk: map PNG, overlay PNG and JSON beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ldmseg_fast.commands.options import (
    add_backend_arguments,
    add_connected_argument,
    add_json_argument,
    add_model_argument,
    add_picture_arguments,
    add_share_arguments,
    add_view_arguments,
    listed,
    lists_among,
    model_folders,
    networks_of,
    print_json,
    speed_of,
    views_of,
)
from ldmseg_fast.commands.picture_results import check_results, image_id, preview_of, write_result
from ldmseg_fast.commands.result_formats import add_format_argument, check_categories, check_formats, write_formats
from ldmseg_fast.commands.shared_job import Outcome, Summary, model_state, run_job
from ldmseg_fast.data.picture_folders import FoundPicture, FoundPictures
from ldmseg_fast.data.pictures import MAX_PIXELS, Picture
from ldmseg_fast.data.shards import find_inputs
from ldmseg_fast.errors import DataError
from ldmseg_fast.inference.inputs import scaled_picture
from ldmseg_fast.outputs import check_outputs
from ldmseg_fast.pipeline import LDMSegPipeline


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
) -> Outcome:
    """Segments `pictures` and writes their results as `write_result` does; those that cannot be read are left out.

    The overlay is scaled down to OVERLAY_SIDE pixels where the picture is larger.

    With several `samples`, or with `views` (the fields of `Views`), the map is an ensemble's
    (`LDMSegPipeline.ensemble`), and OUT/NAME_agreement.png shows how far they agree on each pixel, 255 where all do.
    `sampling` goes to the pipeline.

    Raises:
        ArgumentError: what the pipeline refuses.
        OSError: names the file that cannot be written.
    """
    done = Outcome()
    for batch in _read_batches(pipe, pictures, batch_size, exif, done, views):
        ids = [image_id(found.file) for found, _, _ in batch]
        settings: dict[str, Any] = {"seed": seed, "image_ids": ids, "batch_size": batch_size, **sampling}
        images = [picture for _, picture, _ in batch]
        results: list[Any]
        if samples != 1 or views:
            results = pipe.ensemble(images, samples, num_inference_steps=num_inference_steps, **settings, **views)
        else:
            results = list(pipe(images, num_inference_steps, **settings))
        for (found, _, preview), result in zip(batch, results):
            write_result(out, found, preview, result, pipe.info.categories)
            done.add(out, found)
    return done


def _read_batches(
    pipe: LDMSegPipeline,
    pictures: Sequence[FoundPicture],
    batch_size: int,
    exif: bool,
    done: Outcome,
    views: Mapping[str, Any],
) -> Iterator[list[tuple[FoundPicture, Picture, np.ndarray]]]:
    """Yields batches of pictures at the network's size, with their previews, whose maps fit the memory together."""
    batch: list[tuple[FoundPicture, Picture, np.ndarray]] = []
    pixels = 0
    largest = max((1.0, *views.get("scales", ())))
    for found in pictures:
        try:
            picture = found.read(exif=exif, max_pixels=pipe.max_pixels)
        except DataError as error:
            done.bad.append(str(error))
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
    parser.add_argument(
        "images", nargs="+", help="files, folders, tar files as webdataset writes them, or @FILE with a path a line"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    add_format_argument(parser)
    add_json_argument(parser)
    add_share_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="seeds per picture; above 1 with a map of agreement")
    add_view_arguments(parser)
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the DDIM solver, 0 to 1")
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    parser.add_argument(
        "--cache-interval", type=int, default=1, metavar="N", help="compute deep features every N steps only"
    )
    add_connected_argument(parser)
    add_picture_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Segments the pictures, alone or as one of several ranks. Returns 0, or 1 where some of them could not be read.

    Raises:
        DataError: the files that were named, if none of them could be read.
    """
    names = ("solver", "eta", "cache_interval", "exif", "connected")
    sampling = {name: getattr(args, name) for name in names}
    views = views_of(args)
    stream = sys.stderr if args.json else sys.stdout

    def check() -> None:
        roots = [*model_folders(args.model_dir), args.engine_dir]
        check_outputs({}, {"--out": args.out, "--share": args.share}, roots=roots)

    def find() -> FoundPictures:
        found = find_inputs(listed(args.images), recursive=args.recursive, out=args.out)
        check_results(found.pictures, args.out, lists_among(args.images))
        check_formats(args.formats, found.pictures, args.out, local=args.share is not None)
        return found

    def settings() -> dict[str, Any]:
        names = ("backend", "steps", "seed", "samples", "size", "max_pixels", "batch_size")
        own = {name: getattr(args, name) for name in names}
        own |= networks_of(args)
        own |= {"flip": args.flip, "scales": " ".join(map(str, args.scales))}
        own |= {"fusion": views.get("fusion", "medoid"), "edges": args.edges}
        return {"command": "predict", **model_state(args.model_dir, args.engine_dir), **own, **sampling}

    def load() -> Any:
        pipe = LDMSegPipeline.from_pretrained(
            args.model_dir, args.backend, args.engine_dir, image_size=args.size, **speed_of(args)
        )
        check_categories(args.formats, pipe)
        pipe.max_pixels = args.max_pixels

        def work(pictures: Sequence[FoundPicture]) -> Outcome:
            rest = (args.out, args.steps, args.seed, args.batch_size, args.samples)
            return predict_files(pipe, pictures, *rest, views=views, **sampling)

        return work

    def finish(found: FoundPictures, summary: Summary) -> int:
        written = summary.outcome.names()
        results = [each for each in found.pictures if (each.folder / f"{each.file.stem}.json").as_posix() in written]
        print(f"{len(results)} images segmented: {args.out}", file=stream)
        write_formats(args.formats, results, args.out, exif=args.exif, stream=stream)
        if args.json:
            print_json(summary.facts(found, args.out))
        return summary.tell(found, "segmented", stream)

    return run_job(args, "predict", check, find, settings, load, finish)
