"""`ldmseg`: command line only."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ldmseg", description="Latent-diffusion panoptic segmentation.")
    commands = parser.add_subparsers(dest="command", required=True)

    predict = commands.add_parser("predict", help="segment pictures")
    predict.add_argument("model_dir")
    predict.add_argument("images", nargs="+", help="files or folders")
    predict.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    predict.add_argument("--seed", type=int, default=0)
    predict.add_argument("--samples", type=int, default=1, help="seeds per picture; above 1 with a map of agreement")
    predict.add_argument("--eta", type=float, default=0.0, help="noise of the DDIM solver, 0 to 1")
    predict.add_argument("--cache-interval", type=int, default=1, help="compute deep features each so many steps only")
    _add_backend_arguments(predict)
    predict.set_defaults(run=run_predict)

    from ldmseg_fast.inpaint_command import add_inpaint_arguments, run_inpaint

    inpaint = commands.add_parser("inpaint", help="complete a panoptic map of which a part is given")
    add_inpaint_arguments(inpaint)
    _add_backend_arguments(inpaint)
    inpaint.set_defaults(run=run_inpaint)

    from ldmseg_fast.evaluate_command import add_evaluate_arguments, run_evaluate

    evaluate = commands.add_parser("evaluate", help="panoptic quality of a model on a COCO-panoptic folder")
    add_evaluate_arguments(evaluate)
    _add_backend_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    from ldmseg_fast.error_page.files import add_page_arguments, run_page
    from ldmseg_fast.metrics.pq_command import add_pq_arguments, run_pq

    pq = commands.add_parser("pq", help="panoptic quality of result files, as panopticapi computes it")
    add_pq_arguments(pq)
    add_page_arguments(pq)
    pq.set_defaults(run=lambda args: run_pq(args) or (run_page(args) if args.page else 0))

    from ldmseg_fast.convert import add_convert_arguments, run_convert

    convert = commands.add_parser("convert", help="a published LDMSeg checkpoint as a model folder")
    add_convert_arguments(convert)
    convert.set_defaults(run=run_convert)

    data = commands.add_parser("data", help="check a data set, or generate one").add_subparsers(required=True)
    check = data.add_parser("check", help="look for damaged or inconsistent files")
    check.add_argument("root")
    check.set_defaults(run=run_data_check)
    scenes = data.add_parser("scenes", help="generate scenes in COCO-panoptic layout")
    scenes.add_argument("out", type=Path)
    scenes.add_argument("--images", type=int, required=True, help="training scenes; a tenth more for validation")
    scenes.add_argument("--size", type=int, default=64, help="side in pixels")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.add_argument("--sheet", type=Path, help="also write a 10x10 contact sheet")
    scenes.set_defaults(run=run_data_scenes)

    from ldmseg_fast.data.latent_cache import add_cache_arguments, run_cache

    cache = data.add_parser("cache", help="encode every picture once, for training")
    add_cache_arguments(cache)
    cache.set_defaults(run=run_cache)

    from ldmseg_fast.runs import add_runs_arguments, run_runs

    runs = commands.add_parser("runs", help="training runs below a folder and their best PQ")
    add_runs_arguments(runs)
    runs.set_defaults(run=run_runs)

    report = commands.add_parser("report", help="curves and pictures of one training run as an HTML page")
    report.add_argument("run_dir", type=Path)
    report.add_argument("--out", type=Path, help="default RUN_DIR/report.html")
    report.set_defaults(run=run_report)

    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=run_doctor)
    return parser


def _add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="torch", help="torch, compile, onnxruntime or tensorrt")
    parser.add_argument("--engine-dir", help="exported graphs or engines")
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--solver", default="ddim", help="ddim, dpmpp_2m or heun")


def run_predict(args: argparse.Namespace) -> int:
    from ldmseg_fast.pipeline import LDMSegPipeline
    from ldmseg_fast.predict import find_pictures, predict_files

    files = find_pictures(args.images)
    pipe = LDMSegPipeline.from_pretrained(args.model_dir, args.backend, args.engine_dir)
    sampling = {"solver": args.solver, "eta": args.eta, "cache_interval": args.cache_interval}
    written = predict_files(pipe, files, args.out, args.steps, args.seed, args.batch_size, args.samples, **sampling)
    print(f"{len(written)} images segmented: {args.out}")
    return 0


def run_data_check(args: argparse.Namespace) -> int:
    from ldmseg_fast.data.check import check_folder

    report = check_folder(args.root)
    print(report.table())
    return 0 if report.ok else 1


def run_data_scenes(args: argparse.Namespace) -> int:
    from ldmseg_fast.data.scenes import write_scenes

    write_scenes(args.out, args.images, args.size, args.seed)
    if args.sheet:
        from ldmseg_fast.draw import contact_sheet

        contact_sheet(args.out, "train2017").save(args.sheet)
    print(f"scenes: {args.out}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from ldmseg_fast.report import write_run_report

    print(f"report: {write_run_report(args.run_dir, args.out or args.run_dir / 'report.html')}")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from ldmseg_fast.doctor import examine, format_table

    findings = examine()
    print(format_table(findings))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the answer is no, 2 wrong input."""
    args = build_parser().parse_args(argv)
    from ldmseg_fast.backends import BackendError
    from ldmseg_fast.checkpoint import CheckpointError
    from ldmseg_fast.config import ConfigError
    from ldmseg_fast.data.folders import DataError
    from ldmseg_fast.panoptic_format import PanopticFormatError

    expected = (BackendError, CheckpointError, ConfigError, DataError, PanopticFormatError, OSError, ValueError)
    try:
        return args.run(args)
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except json.JSONDecodeError as error:
        print(f"error: no JSON: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
