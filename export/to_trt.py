"""Builds TensorRT engines of a model folder, or of its ONNX graphs.

python export/to_trt.py MODEL_DIR|ONNX_DIR --out DIR [--flavour tensorrt|rtx] [--target sm80,sm89|portable|current]
    [--precision fp16|bf16|fp8|int8] [--max-batch N]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from ldmseg_fast.backends.graphs.specs import HEADS
from ldmseg_fast.config.limits import check_ranges
from ldmseg_fast.distributed.ending import run_command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="to_trt.py", description="Build TensorRT engines.")
    parser.add_argument("source", metavar="MODEL_DIR|ONNX_DIR", help="a folder, or owner/name[@revision] of the Hub")
    parser.add_argument("--out", required=True, type=Path, help="folder for the engines and their passports")
    parser.add_argument("--flavour", default="tensorrt", choices=["tensorrt", "rtx"])
    parser.add_argument(
        "--target",
        help="current, same (compute capability), portable, or sm80,sm89,...; default current, rtx: portable",
    )
    parser.add_argument(
        "--precision", default=None, choices=["fp32", "fp16", "bf16", "fp8", "int8"], help="default fp16"
    )
    parser.add_argument("--min-batch", type=int, help="default 1")
    parser.add_argument("--opt-batch", type=int, help="the batch to be fastest at, default 1")
    parser.add_argument("--max-batch", type=int, help="default 8; larger ones go through in parts")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="MIN,OPT,MAX", help="batches of one profile; may be repeated"
    )
    parser.add_argument("--max-side", type=int, help="largest side of a map in pixels, default 1024")
    parser.add_argument(
        "--image-sizes", metavar="MIN,OPT,MAX", help="sides of pictures, for graphs exported with --size dynamic"
    )
    parser.add_argument("--level", type=int, choices=range(6), help="builder optimisation level, default 3")
    parser.add_argument("--workspace", type=float, default=0.0, help="GiB of scratch memory; default no limit")
    parser.add_argument("--timing-cache", type=Path, help="default DIR/timing.cache")
    parser.add_argument(
        "--strip", action="store_true", help="build engines without weights; they take those of DIR/onnx"
    )
    parser.add_argument(
        "--version-compatible", action="store_true", help="build engines that later versions of the same major can load"
    )
    parser.add_argument("--verbose", action="store_true", help="write a layer report beside each engine")
    parser.add_argument("--head", choices=HEADS, help="default panoptic; this and the next six need MODEL_DIR")
    parser.add_argument(
        "--sampler-steps", default="", help="also build whole samplers of these numbers of steps, as 1,2,4"
    )
    parser.add_argument(
        "--lora", type=Path, metavar="FILE", help="a LoRA of the UNet, folded into the engines' weights"
    )
    parser.add_argument("--lora-scale", type=float, help="of the LoRA, default 1; 0 changes nothing")
    parser.add_argument("--data", help="COCO-panoptic folder for the parity report; default generated scenes")
    parser.add_argument(
        "--calibration",
        metavar="ROOT",
        help="of fp8 and int8: a COCO-panoptic folder, whose train2017 they see; default --data, or generated scenes",
    )
    parser.add_argument("--parity-images", type=int, help="default 8, of a large model 2")
    parser.add_argument("--no-parity", action="store_true", help="skip the comparison with PyTorch")
    args = parser.parse_args(argv)
    check_ranges(args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Builds and returns the exit code: 0 done, 1 a parity tolerance is missed, 2 wrong input or a build that fails."""
    command = "python export/to_trt.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(parse(argv), command))


def run(args: argparse.Namespace, command: str) -> int:
    """Builds as parsed arguments say; `command` is what the passports name as their maker."""
    from ldmseg_fast.backends.trt.api import load_api
    from ldmseg_fast.export.engine_build import build_engines, check_targets
    from ldmseg_fast.export.engine_parity import engines_agree
    from ldmseg_fast.export.engine_sources import find_graphs, make_job

    job = make_job(args, command)
    api = load_api(args.flavour)
    check_targets(api, job.settings)
    with ExitStack() as held:
        graphs, report = find_graphs(args, job, held)
        if report is not None:
            print(report.table())
            if not report.ok:
                print("error: a tolerance is missed, see above; nothing was built", file=sys.stderr)
                return 1
        passports = build_engines(graphs, args.out, job, api)
        missed = not args.no_parity and not engines_agree(args, api)
    where = f"on {passports[0].gpu}" if passports[0].gpu else "ahead of time, without a GPU"
    print(f"engines: {args.out} ({api.name}, {passports[0].precision}, built {where})")
    if missed:
        print("error: a tolerance is missed by the engines, see above; their passports say so", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
