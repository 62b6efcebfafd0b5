"""Segments many pictures on a Ray cluster: a pool of actors, each with the model loaded once, writes the results.

python examples/ray_predict.py PICTURE_OR_FOLDER ... --out OUT [--model MODEL_DIR] [--actors N] [--gpus G]

Needs `pip install "ray[data]"`, and folders that all machines see. It runs on the cluster of RAY_ADDRESS where that is
set, else on this machine. Every picture gets NAME.png, NAME_overlay.png and NAME.json, as of `ldmseg predict`. Pictures
whose JSON is there are left out, so a second start does the rest; give other settings another folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.commands.picture_results import check_results
from ldmseg_fast.commands.predict import predict_files
from ldmseg_fast.data.picture_folders import FoundPicture, find_pictures
from ldmseg_fast.distributed.ending import run_command


class Segmenter:
    """Segments batches of paths in one actor."""

    def __init__(self, model: str, out: str, steps: int | None, seed: int) -> None:
        self.pipe = LDMSegPipeline.from_pretrained(model)
        self.out, self.steps, self.seed = Path(out), steps, seed

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        pictures = [FoundPicture(Path(file), Path(folder)) for file, folder in zip(batch["file"], batch["folder"])]
        done = predict_files(self.pipe, pictures, self.out, self.steps, self.seed, len(pictures))
        return {"written": [sum(name.endswith(".json") for name in done.files)], "bad": ["\n".join(done.bad)]}


def run(args: argparse.Namespace) -> int:
    found = find_pictures(args.images, recursive=args.recursive, out=args.out)
    check_results(found.pictures, args.out)
    todo = [each for each in found.pictures if not (args.out / each.folder / f"{each.file.stem}.json").is_file()]
    if len(todo) < len(found.pictures):
        print(f"{len(found.pictures) - len(todo)} of {len(found.pictures)} pictures are there already")
    if not todo:
        return 0
    ray.init(log_to_driver=False, include_dashboard=False)
    begun = time.monotonic()
    rows = [{"file": str(each.file.resolve()), "folder": each.folder.as_posix()} for each in todo]
    out, model = str(args.out.resolve()), args.model
    model = str(Path(model).resolve()) if Path(model).is_dir() else model  # a name, such as "tiny", stays one
    results = (
        ray.data.from_items(rows)
        .map_batches(
            Segmenter,
            fn_constructor_args=(model, out, args.steps, args.seed),
            batch_size=args.batch_size,
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            num_cpus=args.cpus,
            num_gpus=args.gpus,
        )
        .take_all()
    )
    seconds = time.monotonic() - begun
    written, bad = sum(row["written"] for row in results), "\n".join(row["bad"] for row in results if row["bad"])
    print(f"{written} images segmented: {args.out} ({written / seconds:.2f} pictures/s with {args.actors} actors)")
    if bad:
        print("could not be segmented:", *bad.splitlines(), sep="\n  ", file=sys.stderr)
    ray.shutdown()
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for map PNG, overlay PNG and JSON")
    parser.add_argument("--model", default="tiny", metavar="MODEL_DIR")
    parser.add_argument("--actors", type=int, default=2, help="processes that have the model loaded")
    parser.add_argument("--cpus", type=float, default=1, help="cores of each actor")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each actor; a half lets two share one")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recursive", action="store_true", help="take the pictures of sub-folders too")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
