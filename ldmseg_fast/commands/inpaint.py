"""`ldmseg inpaint` completes a part of a picture's map: the whole map as PNG, overlay and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ldmseg_fast.commands.options import (
    add_backend_arguments,
    add_json_argument,
    add_model_argument,
    add_picture_arguments,
    model_folders,
    print_json,
    take_model,
)
from ldmseg_fast.commands.result_formats import add_format_argument, check_categories, check_formats, write_formats

EXAMPLES = (
    "ldmseg inpaint tiny --image photo.png --map results/photo.png --unknown-id 0 --out completed",
    "ldmseg inpaint tiny --image photo.png --map results/photo.png --known mask.png --out completed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--image", required=True, type=Path, help="the picture")
    parser.add_argument("--map", required=True, type=Path, help="panoptic PNG of the picture's size")
    known = parser.add_mutually_exclusive_group(required=True)
    known.add_argument(
        "--known", type=Path, help="mask of the same size with two values: the brighter, or opaque, is given"
    )
    known.add_argument("--unknown-id", type=int, help="the map is given where it does not have this id (0 is void)")
    parser.add_argument(
        "--segments", type=Path, metavar="JSON", help="of `predict` or `inpaint` beside the map: the categories in it"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    add_format_argument(parser)
    add_json_argument(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    add_picture_arguments(parser)
    add_backend_arguments(parser)


def read_segments(path: Path) -> list[dict[str, Any]]:
    """Reads the `segments_info` of a result's JSON.

    Raises:
        DataError: another kind of file.
    """
    from ldmseg_fast.errors import DataError
    from ldmseg_fast.files import read_text

    try:
        content = json.loads(read_text(path, DataError))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); give what `ldmseg predict` wrote") from None
    segments = content.get("segments_info") if isinstance(content, dict) else None
    if not isinstance(segments, list) or not all(isinstance(entry, dict) for entry in segments):
        raise DataError(f"{path}: no list segments_info in it; give the JSON that `ldmseg predict` wrote for the map")
    # category 0 may be one of the model's; what no draft had a category for has it with a score of 0
    unnamed = {"category_id": 0, "category_score": 0}
    return [entry for entry in segments if "category_id" in entry and not unnamed.items() <= entry.items()]


def run(args: argparse.Namespace) -> int:
    from ldmseg_fast.commands.predict import check_results, image_id, preview_of, write_result
    from ldmseg_fast.data.masks import read_mask
    from ldmseg_fast.data.picture_folders import FoundPicture
    from ldmseg_fast.data.pictures import read_picture
    from ldmseg_fast.errors import DataError
    from ldmseg_fast.outputs import check_outputs
    from ldmseg_fast.panoptic.format import read_panoptic_png
    from ldmseg_fast.pipeline import LDMSegPipeline

    take_model(args)
    found = FoundPicture(args.image)
    check_outputs({}, {"--out": args.out}, roots=[*model_folders(args.model_dir), args.engine_dir])
    check_results([found], args.out, keep=[args.map, *filter(None, [args.known, args.segments])])
    check_formats(args.formats, [found], args.out)
    segments_info = None if args.segments is None else [read_segments(args.segments)]
    picture = read_picture(args.image, exif=args.exif, max_pixels=args.max_pixels)
    segmentation = read_panoptic_png(args.map, max_pixels=args.max_pixels)
    if args.known is None:
        known = segmentation != args.unknown_id
        if known.all():
            raise DataError(f"{args.map}: no pixel has the id {args.unknown_id} (--unknown-id): nothing to complete")
        if not known.any():
            raise DataError(f"{args.map}: every pixel has the id {args.unknown_id} (--unknown-id): nothing is given")
    else:
        known = read_mask(args.known, exif=args.exif, max_pixels=args.max_pixels)
    for path, size in ((args.map, segmentation.shape), (args.known, known.shape)):
        if size != picture.size:
            turned = ", turned by its EXIF orientation (--keep-orientation keeps the stored pixels)"
            raise DataError(
                f"{path}: {size[1]}x{size[0]} pixels, the picture {args.image} has {picture.size[1]}x{picture.size[0]}"
                f"{turned if picture.turned else ''}"
            )
    if args.known is not None and not segmentation[known].any():
        raise DataError(
            f"{args.known}: the map {args.map} is void wherever this mask gives it: is the mask inverted? White says "
            f"where the map is given"
        )
    pipe = LDMSegPipeline.from_pretrained(
        args.model_dir, args.backend, args.engine_dir, image_size=args.size, cuda_graph=args.cuda_graph
    )
    check_categories(args.formats, pipe)
    result = pipe.inpaint(
        picture,
        segmentation,
        known,
        args.steps,
        seed=args.seed,
        image_ids=[image_id(args.image)],
        solver=args.solver,
        segments_info=segments_info,
    )[0]
    record = write_result(args.out, found, preview_of(picture), result, pipe.info.categories)
    new = sum(not segment["given"] for segment in result.segments_info)
    share = 100.0 * (1.0 - known.mean())
    stream = sys.stderr if args.json else sys.stdout
    print(f"{share:.1f} % of the map completed, {new} new segments: {record}", file=stream)
    write_formats(args.formats, [found], args.out, exif=args.exif, stream=stream)
    if picture.turned:
        print("turned as its EXIF orientation says (--keep-orientation keeps the stored pixels)", file=stream)
    if args.json:
        print_json({"written": record, "completed": share / 100.0, "new_segments": new, "turned": picture.turned})
    return 0
