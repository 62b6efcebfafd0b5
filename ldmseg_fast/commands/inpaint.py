"""`ldmseg inpaint` completes a part of a picture's map: the whole map as PNG, overlay and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldmseg_fast.commands.options import add_backend_arguments, model_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir")
    parser.add_argument("--image", required=True, type=Path, help="the picture")
    parser.add_argument("--map", required=True, type=Path, help="panoptic PNG of the picture's size")
    known = parser.add_mutually_exclusive_group(required=True)
    known.add_argument("--known", type=Path, help="mask PNG of the same size: the map is given where it is white")
    known.add_argument("--unknown-id", type=int, help="the map is given where it does not have this id (0 is void)")
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ldmseg_fast.commands.predict import check_results, image_id, write_result
    from ldmseg_fast.data.folders import open_image, read_image
    from ldmseg_fast.errors import DataError
    from ldmseg_fast.outputs import check_outputs
    from ldmseg_fast.panoptic.format import read_panoptic_png
    from ldmseg_fast.pipeline import LDMSegPipeline

    check_outputs({}, {"--out": args.out}, roots=[*model_folders(args.model_dir), args.engine_dir])
    check_results([args.image], args.out, keep=[args.map, *filter(None, [args.known])])
    image = read_image(args.image)
    segmentation = read_panoptic_png(args.map)
    if args.known is None:
        known = segmentation != args.unknown_id
        if known.all():
            raise DataError(f"{args.map}: no pixel has the id {args.unknown_id} (--unknown-id): nothing to complete")
    else:
        known = np.asarray(open_image(args.known).convert("L")) > 127
    for path, size in ((args.map, segmentation.shape), (args.known, known.shape)):
        if size != image.shape[:2]:
            raise DataError(
                f"{path}: {size[1]}x{size[0]} pixels, the picture {args.image} has {image.shape[1]}x{image.shape[0]}"
            )
    pipe = LDMSegPipeline.from_pretrained(
        args.model_dir, args.backend, args.engine_dir, image_size=args.size, cuda_graph=args.cuda_graph
    )
    result = pipe.inpaint(
        image, segmentation, known, args.steps, seed=args.seed, image_ids=[image_id(args.image)], solver=args.solver
    )[0]
    args.out.mkdir(parents=True, exist_ok=True)
    record = write_result(args.out, args.image, image, result)
    new = sum(not segment["given"] for segment in result.segments_info)
    share = 100.0 * (1.0 - known.mean())
    print(f"{share:.1f} % of the map completed, {new} new segments: {record}")
    return 0
