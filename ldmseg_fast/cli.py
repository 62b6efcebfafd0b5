"""`ldmseg`: command line only."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldmseg_fast import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ldmseg", description="Latent-diffusion panoptic segmentation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=LateParser)

    predict = commands.add_parser("predict", help="segment pictures")
    predict.add_argument("model_dir")
    predict.add_argument("images", nargs="+", help="files or folders")
    predict.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    predict.add_argument("--seed", type=int, default=0)
    predict.add_argument("--samples", type=int, default=1, help="seeds per picture; above 1 with a map of agreement")
    predict.add_argument("--eta", type=float, default=0.0, help="noise of the DDIM solver, 0 to 1")
    predict.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    predict.add_argument("--cache-interval", type=int, default=1, help="compute deep features each so many steps only")
    _add_backend_arguments(predict)
    predict.set_defaults(run=run_predict)

    _add_late(commands, "inpaint", "inpaint_command", "complete a panoptic map of which a part is given", True)
    _add_late(commands, "evaluate", "evaluate_command", "panoptic quality of a model on a COCO-panoptic folder", True)
    _add_late(commands, "pq", "pq_command", "panoptic quality of result files, as panopticapi computes it")
    _add_late(commands, "convert", "convert", "a published LDMSeg checkpoint as a model folder")

    data = commands.add_parser("data", help="check, generate, merge or encode data sets").add_subparsers(required=True)
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

    _add_late(data, "merge", "data.merge_command", "splits of several folders as one, by links")
    _add_late(data, "cache", "data.cache_command", "encode every picture once, for training")

    _add_late(commands, "runs", "runs", "training runs below a folder and their best PQ")
    report = commands.add_parser("report", help="curves and pictures of one training run as an HTML page")
    report.add_argument("run_dir", type=Path)
    report.add_argument("--out", type=Path, help="default RUN_DIR/report.html")
    report.set_defaults(run=run_report)

    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=run_doctor)
    return parser


class LateParser(argparse.ArgumentParser):
    """Gets its arguments when it is used, so that no command waits for the imports of another."""

    fill: Callable[[], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            self.fill()
            self.fill = None
        return super().parse_known_args(args, namespace)


def _add_late(commands: Any, name: str, module: str, text: str, backend: bool = False) -> None:
    """A command whose `add_NAME_arguments` and `run_NAME` stand in a module of their own."""
    parser = commands.add_parser(name, help=text)

    def fill() -> None:
        found = importlib.import_module(f"ldmseg_fast.{module}")
        getattr(found, f"add_{name}_arguments")(parser)
        if backend:
            _add_backend_arguments(parser)
        parser.set_defaults(run=getattr(found, f"run_{name}"))

    parser.fill = fill


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
    pipe = LDMSegPipeline.from_pretrained(args.model_dir, args.backend, args.engine_dir, image_size=args.size)
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
        from ldmseg_fast.reports.draw import contact_sheet

        contact_sheet(args.out, "train2017").save(args.sheet)
    print(f"scenes: {args.out}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from ldmseg_fast.reports.run_page import write_run_report

    print(f"report: {write_run_report(args.run_dir, args.out or args.run_dir / 'report.html')}")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from ldmseg_fast.doctor import examine, format_table

    findings = examine()
    print(format_table(findings))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the answer is no, 2 wrong input, 130 interrupted, 141 nobody reads the output any more."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text in the terminal's encoding
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what is left is tried again at exit
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        from ldmseg_fast.distributed.ending import reason_of

        reason = reason_of(error)
        if reason is None:
            raise
        print(reason[0], file=sys.stderr)
        return reason[1]


if __name__ == "__main__":
    sys.exit(main())
