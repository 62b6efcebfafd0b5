"""Reads the command line of training and starts it.

deepspeed ldmseg_fast/train.py {autoencoder|diffusion|one_step|distillation} [--config NAME_OR_FILE] [--resume]
    data.root=ROOT output_dir=DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder must not hide other packages, the checkout must be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from ldmseg_fast.stopping import tell_interrupts

    tell_interrupts()

from ldmseg_fast import distributed
from ldmseg_fast.config import PRESETS, Config, load_config
from ldmseg_fast.config.recipes import STAGE_NAMES, describe_recipe
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import read_json


class Parser(argparse.ArgumentParser):
    """Raises wrong usage as an error like any other, which is said once and not by every rank."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises ConfigError in the place of argparse's exit."""
        raise ConfigError(f"{message}; {self.prog} --help lists what there is")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Reads the command line and loads the configuration that it names.

    Raises:
        ConfigError: wrong usage, or settings that cannot be.
    """
    parser = Parser(prog="train.py", description="Train a stage; settings are written key=value.")
    parser.add_argument("stage", choices=STAGE_NAMES)
    parser.add_argument("--config", default="tiny", help=f"a preset ({', '.join(PRESETS)}) or a YAML/JSON file")
    parser.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    parser.add_argument("--trust", action="store_true", help="with --resume: also read pickles that DeepSpeed wrote")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print settings, parameters and memory, check data.root and output_dir, and stop",
    )
    parser.add_argument("--deepspeed_config", metavar="JSON", help="file of more DeepSpeed settings, merged with ours")
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # other scripts are started with it
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("settings", nargs="*", help="key=value, such as train.steps=1000")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.settings, args.stage)
    record = Path(config.output_dir) / "config.json"
    if args.resume and config.output_dir and record.is_file():
        config = load_config(args.config, args.settings, args.stage, read_json(record))
    return args, config


def run(argv: list[str] | None) -> None:
    """Trains, or prints what `--dry-run` asks for."""
    args, config = parse(argv)
    recipe = describe_recipe(args.config, args.stage, config)
    user_config = None
    if args.deepspeed_config:
        from ldmseg_fast.training.deepspeed_settings import read_user_config

        user_config = read_user_config(args.deepspeed_config)
    if args.dry_run:
        from ldmseg_fast.training.estimate import dry_run
        from ldmseg_fast.training.rehearsal import rehearse

        lines = [*recipe, *dry_run(args.stage, config, user_config)]
        if distributed.is_main():
            print("\n".join(lines))
        if found := rehearse(args.stage, config, args.resume, args.trust):
            lines = ["", *found]
            if distributed.is_main():
                print("\n".join(lines))
        return
    for key, value in (("data.root", config.data.root), ("output_dir", config.output_dir)):
        if not value:
            raise ConfigError(f"{key} is missing; write {key}=FOLDER")
    from ldmseg_fast.allocator import keep_freed_memory
    from ldmseg_fast.training.loop import train

    if not distributed.launched() or not config.train.zero_stage:
        keep_freed_memory()  # DeepSpeed's flat copies come and go: kept, they were a gigabyte more of each rank
    folder = train(args.stage, config, args.resume, user_config, args.trust, notes=recipe)
    if distributed.is_main():
        print(f"model folder: {folder}")


def main(argv: list[str] | None = None) -> int:
    """Trains and returns the exit code.

    0: done, 2: wrong input or a fault (one line says which and what to do), 143 or 130: stopped by a signal after
    saving.
    """
    from ldmseg_fast.distributed.ending import exit_code_of
    from ldmseg_fast.distributed.liveness import Interrupt
    from ldmseg_fast.streams import open_streams

    open_streams()
    try:
        distributed.start()
        with Interrupt():  # from here on the ranks end together, also while the rest is imported
            run(argv)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        if distributed.launched():
            sys.stdout.flush()
            os._exit(code)  # leaving the process group would wait for ranks that may be stuck in a collective
        return code
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
