"""`make demo`: the shipped model on held-out scenes -> scenes to train on -> both stages under DeepSpeed -> a report.

For a bare machine, and in bounded time: evaluations take as many scenes, and trainings as many steps, as their share of
--minutes allows. What is done is skipped by the next start, which goes on with an interrupted part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import read_text, replacing, write_json
from ldmseg_fast.locks import only_writer
from ldmseg_fast.reports.demo_page import newest_losses, write_demo_page
from ldmseg_fast.reports.run_page import require_matplotlib
from ldmseg_fast.training.launch import launch_training

SHIPPED = "tiny"
PROGRESS = "progress.json"
SCENES_SEED = 7  # no scene that the shipped model was trained on
SIZE = 64
SHOWN = 8  # scenes in each grid of pictures
SHARES = {"shipped model": 0.08, "evaluation": 0.2}  # of the minutes; the trainings get what is left
AUTOENCODER_SHARE = 0.4  # of what the trainings get
LAUNCH = 15.0  # processor seconds of a training before its first step and after its last, one after the other
TRAINING = [
    "train.warmup=20",
    "train.log_every=5",
    "train.save_every=25",
    "train.validate_every=100",
    f"data.val_limit={SHOWN}",
]


class Progress:
    """Keeps in OUT/progress.json which parts are done, what each took, and how long each training may take.

    Attributes:
        done: wall and processor seconds of each finished part.
        minutes: `train.max_minutes` of each training that was begun.
    """

    def __init__(self, out: Path) -> None:
        """Reads what an earlier start has noted.

        Raises:
            ArgumentError: the file is damaged, or another program's.
        """
        self.path = out / PROGRESS
        self.done: dict[str, dict[str, float]] = {}
        self.minutes: dict[str, float] = {}
        if self.path.is_file():
            self.done, self.minutes = self._read()

    def _read(self) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        try:
            known = json.loads(read_text(self.path, ArgumentError))
            done, minutes = known.get("done", {}), known.get("minutes", {})
            times = [part[key] for part in done.values() for key in ("seconds", "processor_seconds")]
            whole = all(isinstance(value, int | float) and value >= 0 for value in (*times, *minutes.values()))
        except ArgumentError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise ArgumentError(
                f"{self.path}: damaged, or no demo's; choose another folder, or delete it with its folder"
            )
        return done, minutes

    def save(self) -> None:
        write_json(self.path, {"done": self.done, "minutes": self.minutes})

    def used(self) -> float:
        """Wall seconds of all finished parts."""
        return sum(part["seconds"] for part in self.done.values())

    def run(self, name: str, part: Callable[[], str]) -> None:
        """Runs a part, unless an earlier start has, and prints a line with what it says of itself."""
        if name in self.done:
            print(f"{name}: done before ({self.done[name]['seconds']:.0f} s)", flush=True)
            return
        start, processor = time.monotonic(), _processor_seconds()
        result = part()
        self.done[name] = {"seconds": time.monotonic() - start, "processor_seconds": _processor_seconds() - processor}
        self.save()
        print(f"{name}: {self.done[name]['seconds']:.0f} s, {result}", flush=True)


def _processor_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    return sum(os.times()[:4])


class Demo:
    """Holds the parts of the demo; each returns one line about its result."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.progress = args, Path(args.out), Progress(args.out)
        self.held_out, self.scenes = self.out / "held-out", self.out / "scenes"
        self.autoencoder, self.diffusion = self.out / "autoencoder", self.out / "diffusion"
        self.seconds = 60.0 * args.minutes

    def parts(self) -> dict[str, Callable[[], str]]:
        """Names the parts, in their order."""
        return {
            "shipped model": self.use_shipped,
            "scenes": self.write_scenes,
            "autoencoder": self.train_autoencoder,
            "diffusion": self.train_diffusion,
            "evaluation": self.evaluate_trained,
        }

    def use_shipped(self) -> str:
        """Segments and scores scenes that the shipped model has not seen."""
        from ldmseg_fast.data.scenes import write_scenes

        write_scenes(self.held_out, 1, SIZE, SCENES_SEED, val_images=self.args.images, version=1)
        return self.evaluate(SHIPPED, "shipped", self.seconds * SHARES["shipped model"])

    def write_scenes(self) -> str:
        """Generates the scenes that both stages train on."""
        from ldmseg_fast.data.scenes import write_scenes

        write_scenes(self.scenes, self.args.scenes, SIZE, SCENES_SEED, val_images=self.args.images, version=1)
        return f"{self.args.scenes} to train on"

    def train_autoencoder(self) -> str:
        """Trains the first stage."""
        part = AUTOENCODER_SHARE * self.left_to_train()
        return self.train("autoencoder", self.autoencoder, self.args.autoencoder_steps, part - self.launch_time())

    def train_diffusion(self) -> str:
        """Trains the second stage on the first one's latents."""
        seconds, settings = self.left_to_train() - self.launch_time(), f"model.mask_vae={self.autoencoder}"
        return self.train("diffusion", self.diffusion, self.args.diffusion_steps, seconds, settings)

    def launch_time(self) -> float:
        """Guesses the wall seconds that a training takes beside its steps, on a machine with other work too."""
        part = self.progress.done["shipped model"]
        guess = LAUNCH * max(part["seconds"] / part["processor_seconds"], 1.0)
        if "autoencoder" in self.progress.done:  # it has told, unless an earlier start did most of it
            told = self.progress.done["autoencoder"]["seconds"] - newest_losses(self.autoencoder)["seconds"]
            guess = max(guess, told)
        return guess

    def left_to_train(self) -> float:
        """Seconds until the evaluation has to begin."""
        return self.seconds * (1 - SHARES["evaluation"]) - self.progress.used()

    def train(self, stage: str, folder: Path, steps: int, seconds: float, *settings: str) -> str:
        """Trains until `steps` or for `seconds`, of which an interrupted training keeps what it was given first."""
        minutes = self.progress.minutes.setdefault(stage, max(seconds, 1.0) / 60)
        self.progress.save()
        own = ["--config", "tiny", f"data.root={self.scenes}", f"train.steps={steps}", *TRAINING, *settings]
        launch_training(stage, folder, own, self.args.ranks, minutes)
        run = newest_losses(folder)
        return f"{run['step']} steps, loss {run['loss']:.3f}"

    def evaluate_trained(self) -> str:
        """Scores the model that was trained here, and its auto-encoder alone."""
        from ldmseg_fast.evaluation import EvaluationOptions, evaluate

        left = min(self.seconds * SHARES["evaluation"], self.seconds - self.progress.used())
        said = self.evaluate(self.diffusion, "evaluation", 0.6 * left)
        limit = EvaluationOptions(limit=self.report("evaluation")["images"])
        write_json(self.out / "reconstruction.json", evaluate(self.autoencoder, self.held_out, limit))
        return said

    def evaluate(self, model: str | Path, name: str, seconds: float) -> str:
        """Writes OUT/NAME.json, and the segments of the first scenes as OUT/NAME.png.

        It takes as many scenes as `seconds` seem to allow, by the time that the first ones took.
        """
        from ldmseg_fast.evaluation import EvaluationOptions, evaluate

        shutil.rmtree(self.out / name, ignore_errors=True)  # of a start that was interrupted
        options = EvaluationOptions(limit=SHOWN, batch_size=SHOWN, out=str(self.out / name))
        report = evaluate(model, self.held_out, options)
        limit = min(int(seconds / report["seconds_per_image"]), self.args.images)
        if limit > SHOWN:
            report = evaluate(model, self.held_out, replace(options, limit=limit))  # the first ones are read back
        self.draw(name)
        write_json(self.out / f"{name}.json", report)
        return f"PQ {report['class_agnostic']['pq']:.1f} on {report['images']} held-out scenes"

    def draw(self, name: str) -> None:
        """Draws the first results of an evaluation beside their pictures, into OUT/NAME.png."""
        from ldmseg_fast.data.folders import read_image
        from ldmseg_fast.panoptic.format import read_panoptic_png
        from ldmseg_fast.reports.draw import enlarge, overlay, picture_grid

        cells = []
        for path in sorted((self.out / name / "panoptic").glob("*.png"))[:SHOWN]:
            image, ids = read_image(self.held_out / "val2017" / path.name), read_panoptic_png(path)
            image, ids = enlarge(image, 256), enlarge(ids, 256)
            cells += [image, overlay(image, ids)]
        rows = [cells[start : start + 4] for start in range(0, len(cells), 4)]
        with replacing(self.out / f"{name}.png") as temporary:
            picture_grid(rows, ["image", "segments"] * 2).save(temporary, format="PNG")

    def report(self, name: str) -> dict[str, Any]:
        """Reads what `evaluate` wrote."""
        return json.loads((self.out / f"{name}.json").read_text(encoding="utf-8"))


@contextmanager
def interruptible(again: str):
    """Makes SIGTERM end the block as Ctrl-C does, and says then how to go on."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or stop.code == 128 + signal.SIGTERM:
            print(f"stopped; {again} goes on from here", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


EXAMPLES = ("ldmseg demo --out demo --minutes 8",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of work, all parts together")
    parser.add_argument("--scenes", type=int, default=1000, help="to train on")
    parser.add_argument("--images", type=int, default=100, help="held-out scenes to evaluate, at most")
    parser.add_argument("--autoencoder-steps", type=int, default=3000, help="at most")
    parser.add_argument("--diffusion-steps", type=int, default=3000, help="at most")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or min(2, os.cpu_count() or 1))


def run(args: argparse.Namespace) -> int:
    """Runs every part that is not done and writes the report.

    Returns:
        Exit code 0.

    Raises:
        ArgumentError: nonsense in the numbers, or something else in the folder.
        InUseError: another demo writes there.
        SystemExit: a training failed, or SIGTERM came.
    """
    for name in ("minutes", "scenes", "images", "autoencoder_steps", "diffusion_steps", "ranks"):
        if getattr(args, name) <= 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if not (args.out / PROGRESS).is_file() and args.out.is_dir() and any(args.out.iterdir()):
        raise ArgumentError(f"--out {args.out}: holds something that no demo has written; choose another folder")
    require_matplotlib()  # the last part needs it
    torch.set_num_threads(1)  # beside other work, threads that wait for each other cost more than they give
    with only_writer(args.out, "a demo", "or choose another --out"), interruptible("the same command"):
        demo = Demo(args)
        demo.progress.save()
        for name, part in demo.parts().items():
            demo.progress.run(name, part)
        path = write_demo_page(args.out, demo.progress.done, args.minutes)
    quality = {name: demo.report(name)["class_agnostic"]["pq"] for name in ("shipped", "evaluation")}
    print(f"PQ: {quality['shipped']:.1f} shipped model, {quality['evaluation']:.1f} trained here\nreport: {path}")
    return 0
