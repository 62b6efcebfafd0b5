"""Exports a model folder as ONNX graphs, checked against PyTorch.

python export/to_onnx.py MODEL_DIR --out DIR [--precision fp32|fp16|bf16|int8] [--data ROOT]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from ldmseg_fast.backends.graphs.specs import HEADS
from ldmseg_fast.config.limits import check_ranges
from ldmseg_fast.distributed.ending import run_command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="to_onnx.py", description="Export a model folder as ONNX graphs.")
    parser.add_argument("model_dir", help="a folder, a shipped model, or owner/name[@revision] of the Hub")
    parser.add_argument("--out", required=True, type=Path, help="folder for the graphs; an older export is replaced")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument("--opset", type=int, help="opset of ONNX, 18 to 23; default 21, for bf16 22")
    parser.add_argument("--batch", default="dynamic", help="a fixed batch size; default dynamic")
    parser.add_argument("--size", default="model", help="side of the pictures, or dynamic; default the model's")
    parser.add_argument("--head", default="panoptic", choices=HEADS, help="what the mask decoder returns")
    parser.add_argument(
        "--sampler-steps", default="", help="also export whole samplers of these numbers of steps, as 1,2,4"
    )
    parser.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA of the UNet, folded into the graphs' weights")
    parser.add_argument("--lora-scale", type=float, help="of the LoRA, default 1; 0 changes nothing")
    parser.add_argument("--data", help="COCO-panoptic folder for the parity report; default generated scenes")
    parser.add_argument("--split", help="of --data; default val2017")
    parser.add_argument(
        "--calibration",
        metavar="ROOT",
        help="of int8: a COCO-panoptic folder, whose train2017 it sees; default --data, or generated scenes",
    )
    parser.add_argument("--parity-images", type=int, help="default 8, of a large model 2")
    parser.add_argument("--no-parity", action="store_true", help="skip the comparison with PyTorch")
    args = parser.parse_args(argv)
    check_ranges(args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Exports and returns the exit code: 0 done, 1 a tolerance is missed (nothing is left in DIR), 2 wrong input."""
    command = "python export/to_onnx.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(parse(argv), command))


def run(args: argparse.Namespace, command: str) -> int:
    """Exports as parsed arguments say; `command` is what the manifest names as its maker."""
    from ldmseg_fast.checkpoints.shipped import resolve_model_dir
    from ldmseg_fast.export.model_export import ExportSettings, check_arguments, export_model

    check_arguments(args)
    settings = ExportSettings(
        precision=args.precision,
        opset=args.opset,
        batch=args.batch,
        size=args.size,
        head=args.head,
        sampler_steps=args.sampler_steps,
        parity=not args.no_parity,
        parity_images=args.parity_images,
        data=args.data,
        calibration=args.calibration,
        split=args.split or ExportSettings.split,
        lora=args.lora,
        lora_scale=args.lora_scale,
        command=command,
    )
    report = export_model(resolve_model_dir(args.model_dir), args.out, settings, print)
    if report is not None:
        print(report.table())
        if not report.ok:
            print(f"error: a tolerance is missed, see above; {args.out} was not written", file=sys.stderr)
            return 1
    print(f"graphs: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
