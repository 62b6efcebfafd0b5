"""Writes engines, or ONNX graphs, as a model repository of NVIDIA's Triton Inference Server.

python export/to_triton.py ENGINE_DIR|ONNX_DIR --out REPOSITORY
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from ldmseg_fast.config.limits import check_ranges
from ldmseg_fast.distributed.ending import run_command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="to_triton.py", description="Write a Triton model repository.")
    parser.add_argument(
        "source", metavar="ENGINE_DIR|ONNX_DIR", help="a folder; ONNX graphs also owner/name of the Hub"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the repository")
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--max-batch", type=int, help="largest batch; default the engines' own, of ONNX graphs 8")
    parser.add_argument("--queue-delay", type=int, default=2000, help="microseconds a request waits for others")
    parser.add_argument("--instances", type=int, default=1, help="instances of every model")
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument(
        "--no-cuda-graph", dest="cuda_graphs", action="store_false", help="run engines without capturing them"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=2**25, metavar="N", help="refuse larger pictures (default 33554432)"
    )
    parser.add_argument("--image", help="the server's container, for the README.md; default NVIDIA's of August 2026")
    args = parser.parse_args(argv)
    check_ranges(args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Writes the repository and returns the exit code: 0 done, 2 wrong input."""
    return run_command(lambda: run(parse(argv)))


def run(args: argparse.Namespace) -> int:
    """Writes the repository as parsed arguments say."""
    from ldmseg_fast.checkpoints.shipped import resolve_engine_dir
    from ldmseg_fast.export.triton_repository import RepositorySettings, write_repository

    settings = RepositorySettings(
        args.steps,
        args.max_batch,
        args.queue_delay,
        args.instances,
        args.device,
        args.cuda_graphs,
        args.max_pixels,
        args.image or RepositorySettings.image,
    )
    names = write_repository(resolve_engine_dir(args.source, "onnxruntime"), args.out, settings)
    print(f"repository: {args.out} ({', '.join(names)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
