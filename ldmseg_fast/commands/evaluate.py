"""`ldmseg evaluate` measures the panoptic quality of a model on a COCO-panoptic folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from dataclasses import replace
from pathlib import Path

from ldmseg_fast.commands.options import (
    add_backend_arguments,
    add_connected_argument,
    add_model_argument,
    add_report_argument,
    add_view_arguments,
    from_hub,
    model_folders,
    output_file,
    speed_of,
    take_model,
    take_model_pinned,
    views_of,
)
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.outputs import report_stream, same_place

MODEL_FILES = ("model_index.json", "README.md", "config.json", "settings.txt")  # beside the components
OWN_RESULTS = re.compile(r"\.?(panoptic|inpainting).*\.jsonl?$")


EXAMPLES = (
    "ldmseg evaluate tiny --data scenes",
    "ldmseg evaluate MODEL_DIR --data COCO --steps 50 --page errors.html",
    "ldmseg evaluate tiny --data scenes --json > report.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, "a diffusion model, or a mask auto-encoder, which reconstructs the split")
    parser.add_argument("--data", required=True, help="COCO-panoptic folder")
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--mask-th", type=float, help="least softmax probability of a pixel")
    parser.add_argument("--count-th", type=int, help="least area of a segment in pixels")
    parser.add_argument("--overlap-th", type=float, help="least share of a segment's own area that it must win")
    add_connected_argument(parser)
    parser.add_argument("--ids", help="id assignment of an auto-encoder's reconstruction (random, position, ...)")
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="mean and deviation over K noise seeds")
    parser.add_argument("--samples", type=int, default=1, help="seeds of an ensemble per picture, joined to one map")
    add_view_arguments(parser)
    parser.add_argument("--limit", type=int, default=0, help="first N images only")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the DDIM solver, 0 to 1")
    parser.add_argument(
        "--class-agnostic", action="store_true", help="leave the categories of a model that has them out of the scores"
    )
    parser.add_argument(
        "--unfused",
        action="store_true",
        help="with --class-agnostic or --inpainting: leave them out of the maps too, so that stuff stays apart",
    )
    parser.add_argument(
        "--class-aware",
        metavar="SOURCE",
        help="give segments a category by majority vote: GT (ground truth, an upper bound), a folder of "
        "semantic PNGs, or a JSON of COCO panoptic results",
    )
    parser.add_argument(
        "--inpainting", action="store_true", help="measure the PQ of maps whose dropped blocks are completed"
    )
    parser.add_argument("--block", type=int, nargs="+", metavar="PX", help="sides of the blocks (default 16)")
    parser.add_argument(
        "--probability", type=float, nargs="+", metavar="P", help="of a block being dropped (default 0.1 ... 0.9)"
    )
    parser.add_argument("--out", help="folder for COCO panoptic results (JSON + PNG); goes on where it was interrupted")
    parser.add_argument(
        "--instances", type=output_file, metavar="FILE", help="segments as COCO instance results (RLE, scores)"
    )
    parser.add_argument("--page", type=output_file, metavar="FILE", help="HTML page with pictures of errors")
    parser.add_argument("--worst", type=int, default=8, metavar="K", help="worst images on the page (default 8)")
    parser.add_argument("--random", type=int, default=8, metavar="K", help="random images on the page (default 8)")
    parser.add_argument("--no-baselines", action="store_true", help="leave the rows of trivial baselines out")
    parser.add_argument("--boundary", action="store_true", help="also boundary PQ, which asks for exact edges")
    add_report_argument(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints and writes what was asked for, and returns 0."""
    from ldmseg_fast import distributed
    from ldmseg_fast.distributed.ending import joined_ranks
    from ldmseg_fast.distributed.ranks import ranks_of, use_own_device, use_slurm
    from ldmseg_fast.evaluation import EvaluationOptions, evaluate, format_report
    from ldmseg_fast.files import check_output, write_json

    if not args.inpainting and (args.block or args.probability):
        raise ArgumentError("--block and --probability are settings of --inpainting; add that option")
    defaults = EvaluationOptions()
    options = EvaluationOptions(
        split=args.split,
        steps=args.steps,
        mask_threshold=args.mask_th,
        count_threshold=args.count_th,
        overlap_threshold=args.overlap_th,
        connected=args.connected,
        seed=args.seed,
        seeds=args.seeds,
        samples=args.samples,
        **views_of(args),
        limit=args.limit,
        batch_size=args.batch_size,
        id_assignment=args.ids,
        image_size=args.size,
        solver=args.solver,
        eta=args.eta,
        backend=args.backend,
        engine_dir=args.engine_dir,
        **speed_of(args),
        baselines=not args.no_baselines,
        boundary=args.boundary,
        class_agnostic=args.class_agnostic,
        unfused=args.unfused,
        class_aware=args.class_aware,
        inpainting=args.inpainting,
        blocks=tuple(args.block or defaults.blocks),
        probabilities=tuple(args.probability or defaults.probabilities),
        out=args.out,
        instances=str(args.instances) if args.instances else None,
        page=args.page,
        worst=args.worst,
        random=args.random,
    )
    files = (args.json, args.instances, args.page)
    use_slurm(os.environ)
    use_own_device(ranks_of(os.environ), args.threads)
    begun = time.monotonic()
    with joined_ranks():
        if distributed.world_size() > 1 and from_hub(args):  # a branch may move between two ranks' questions
            vars(args).update(distributed.from_main(lambda: take_model_pinned(args)))
        take_model(args)
        options = replace(options, engine_dir=args.engine_dir)
        _check_meant_for_model(args)
        _check_outputs(args)
        for path in files if distributed.is_main() else ():
            if path:
                check_output(path)
        report = evaluate(args.model_dir, args.data, options)
        ranks, seconds = distributed.world_size(), time.monotonic() - begun
    if distributed.is_main():
        if args.json:
            write_json(args.json, report)
        stream = report_stream(files)
        print(format_report(report), file=stream)
        if ranks > 1:
            rate = report["images"] / seconds
            print(
                f"{report['images']} pictures in {seconds:.1f} s on {ranks} ranks: {rate:.2f} pictures/s", file=stream
            )
        for name, path in zip(("report", "instances", "page", "results"), (*files, args.out)):
            if path:
                print(f"{name}: {path}", file=stream)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises ArgumentError for outputs that would replace the model, the data set or each other."""
    from ldmseg_fast.data.folders import find_split
    from ldmseg_fast.outputs import check_outputs

    model, *components = model_folders(args.model_dir)
    inputs = [*(model / name for name in MODEL_FILES), *(path for folder in components for path in folder.glob("*"))]
    annotations = None
    with contextlib.suppress(DataError):  # it is told later
        split = find_split(args.data, args.split)
        inputs += [split.annotations, split.images, split.maps]
        annotations = split.annotations.parent
    engines = Path(args.engine_dir) if args.engine_dir else None
    inputs += [path for path in engines.glob("*") if path.is_file()] if engines else []
    source = Path(args.class_aware) if args.class_aware and args.class_aware != "GT" else None
    inputs += [source] if source else []
    files = {"--json": args.json, "--instances": args.instances, "--page": args.page}
    folders = {"--out": args.out, "maps of --out": Path(args.out) / "panoptic"} if args.out else {}
    check_outputs(files, folders, inputs=inputs, roots=[model, *components, args.data, annotations, engines])
    for option, path in {**files, "--class-aware": source}.items():
        if args.out and path and OWN_RESULTS.match(Path(path).name) and same_place(Path(path).parent, Path(args.out)):
            raise ArgumentError(f"{option} {path}: --out {args.out} writes a file of this name; choose another path")


def _check_meant_for_model(args: argparse.Namespace) -> None:
    """Raises ArgumentError for options that this kind of model has no use for."""
    from ldmseg_fast.evaluation.predictors import is_autoencoder

    if is_autoencoder(args.model_dir):
        kind, given = (
            "a mask auto-encoder does not sample",
            {
                "--steps": args.steps is not None,
                "--solver": args.solver != "ddim",
                "--eta": args.eta != 0,
                "--backend": args.backend != "torch",
                "--engine-dir": args.engine_dir is not None,
                "--cuda-graph": args.cuda_graph is True,
                "--no-cuda-graph": args.cuda_graph is False,
                "--fused": args.fused is True,
                "--fused-epilogues": args.fused == "epilogues",
                "--precision": args.precision is not None,
                "--attention": args.attention != "auto",
                "--profile": args.profile is not None,
                "--kernel-specialization": args.kernel_specialization is not None,
                "--graph-strategy": args.graph_strategy is not None,
            },
        )
    else:
        kind, given = "a diffusion model does not see the segments", {"--ids": args.ids is not None}
    if unused := [name for name, is_given in given.items() if is_given]:
        raise ArgumentError(f"{', '.join(unused)}: {args.model_dir} cannot use it, because {kind}; leave it out")
