"""`ldmseg inpaint` completes parts of pictures' maps: the whole map as PNG, overlay and JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast.commands.options import (
    add_backend_arguments,
    add_edges_argument,
    add_json_argument,
    add_model_argument,
    add_picture_arguments,
    add_share_arguments,
    listed,
    lists_among,
    model_folders,
    networks_of,
    print_json,
    speed_of,
)
from ldmseg_fast.commands.result_formats import add_format_argument, check_categories, check_formats, write_formats

EXAMPLES = (
    "ldmseg inpaint tiny --image photo.png --map results/photo.png --unknown-id 0 --out completed",
    "ldmseg inpaint tiny --image photo.png --map results/photo.png --known mask.png --out completed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--image",
        nargs="+",
        required=True,
        metavar="PATH",
        help="the picture; or several, folders, tar files as webdataset writes them, or @FILE with a path a line",
    )
    parser.add_argument(
        "--map",
        type=Path,
        help="panoptic PNG of the picture's size; of several pictures a folder with NAME.png of each (of tar files "
        "left out: KEY.map.png)",
    )
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--known",
        type=Path,
        help="mask of the same size with two values: the brighter, or opaque, is given; or a folder of such masks (of "
        "tar files left out: KEY.known.png)",
    )
    known.add_argument("--unknown-id", type=int, help="the map is given where it does not have this id (0 is void)")
    parser.add_argument(
        "--segments",
        type=Path,
        metavar="JSON",
        help="of `predict` or `inpaint` beside the map, or a folder of them: the categories in it",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    add_format_argument(parser)
    add_json_argument(parser)
    add_share_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    add_edges_argument(parser)
    add_picture_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Completes the maps, alone or as one of several ranks. Returns 0, or 1 where some of them could not be.

    Raises:
        DataError: what was named, if no map could be completed.
    """
    from ldmseg_fast.commands.partial_maps import PartialMaps
    from ldmseg_fast.commands.picture_results import check_results
    from ldmseg_fast.commands.shared_job import Summary, model_state, run_job
    from ldmseg_fast.data.picture_folders import FoundPicture, FoundPictures
    from ldmseg_fast.data.shards import find_inputs
    from ldmseg_fast.outputs import check_outputs
    from ldmseg_fast.pipeline import LDMSegPipeline

    stream = sys.stderr if args.json else sys.stdout
    maps = PartialMaps(
        args.map, args.known, args.unknown_id, args.segments, args.exif, args.max_pixels, args.out, args.batch_size
    )

    def check() -> None:
        roots = [*model_folders(args.model_dir), args.engine_dir]
        check_outputs({}, {"--out": args.out, "--share": args.share}, roots=roots)

    def find() -> FoundPictures:
        found = find_inputs(listed(args.image), recursive=args.recursive, out=args.out)
        maps.check(found.pictures)
        read = {path: None for picture in found.pictures for path in maps.files(picture)}
        check_results(found.pictures, args.out, [*read, *lists_among(args.image)])
        check_formats(args.formats, found.pictures, args.out, local=args.share is not None)
        return found

    def settings() -> dict[str, Any]:
        names = (
            *("backend", "steps", "solver", "seed", "size", "edges"),
            *("exif", "max_pixels", "batch_size", "unknown_id"),
        )
        own = {name: getattr(args, name) for name in names}
        own |= networks_of(args)
        return {"command": "inpaint", **model_state(args.model_dir, args.engine_dir), **own}

    def load() -> Any:
        pipe = LDMSegPipeline.from_pretrained(
            args.model_dir, args.backend, args.engine_dir, image_size=args.size, **speed_of(args)
        )
        check_categories(args.formats, pipe)
        pipe.max_pixels = args.max_pixels

        def work(pictures: Sequence[FoundPicture]) -> Any:
            sampling = {"num_inference_steps": args.steps, "seed": args.seed, "solver": args.solver}
            return maps.complete(pipe, pictures, edges=args.edges, **sampling)

        return work

    def finish(found: FoundPictures, summary: Summary) -> int:
        outcome, written = summary.outcome, summary.outcome.names()
        results = [each for each in found.pictures if (each.folder / f"{each.file.stem}.json").as_posix() in written]
        if len(found.pictures) == len(results) == 1:
            record = args.out / results[0].folder / f"{results[0].file.stem}.json"
            print(f"{outcome.share:.1f} % of the map completed, {outcome.new} new segments: {record}", file=stream)
        else:
            share = outcome.share / max(len(results), 1)
            text = f"{len(results)} maps completed, {share:.1f} % of each, {outcome.new} new segments: {args.out}"
            print(text, file=stream)
        write_formats(args.formats, results, args.out, exif=args.exif, stream=stream)
        if args.json:
            share = outcome.share / max(len(results), 1) / 100.0
            print_json(summary.facts(found, args.out) | {"completed": share, "new_segments": outcome.new})
        if len(found.pictures) == 1 and outcome.turned:
            print("turned as its EXIF orientation says (--keep-orientation keeps the stored pixels)", file=stream)
            outcome.turned = 0
        return summary.tell(found, "completed", stream)

    return run_job(args, "inpaint", check, find, settings, load, finish, maps.files)
