"""Command line of training.

deepspeed ldmseg_fast/train.py {autoencoder|diffusion} [--config NAME_OR_FILE] [--resume] data.root=ROOT output_dir=DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder must not hide other packages, the checkout must be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ldmseg_fast.config import Config, ConfigError, describe, load_config
from ldmseg_fast.panoptic_format import PanopticFormatError


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(prog="train.py", description="Train a stage; settings are written key=value.")
    parser.add_argument("stage", choices=["autoencoder", "diffusion"])
    parser.add_argument("--config", default="tiny", help="a preset (tiny, coco) or a YAML/JSON file; default tiny")
    parser.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("settings", nargs="*", help="key=value, such as train.steps=1000")
    args = parser.parse_intermixed_args(argv)
    return args, load_config(args.config, args.settings)


def main(argv: list[str] | None = None) -> int:
    from ldmseg_fast.checkpoint import CheckpointError

    try:
        args, config = parse(argv)
        if args.dry_run:
            print("\n".join(describe(config)))
            return 0
        for key, value in (("data.root", config.data.root), ("output_dir", config.output_dir)):
            if not value:
                raise ConfigError(f"{key} is missing; write {key}=FOLDER")
        from ldmseg_fast import distributed
        from ldmseg_fast.engine import train

        distributed.start()
        folder = train(args.stage, config, args.resume)
        main_rank = distributed.is_main()
        distributed.stop()
    except (ConfigError, CheckpointError, PanopticFormatError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if main_rank:
        print(f"model folder: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
