"""`make demo`: scenes -> the shipped model on them -> both stages trained under DeepSpeed -> one HTML report.

It needs nothing but this package. A part is skipped where its result is already there, so a second run goes on with an
interrupted first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ldmseg_fast.files import write_json
from ldmseg_fast.reports.page import Page
from ldmseg_fast.reports.run_page import curves, last_picture, quality_rows

SHIPPED = "tiny"
SCENES_SEED = 7  # no scene that the shipped model was trained on
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def free_port() -> int:
    """Finds a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_training(stage: str, folder: Path, settings: list[str], ranks: int) -> float:
    """Trains, or continues, in `folder`; returns the wall seconds. Raises SystemExit with the launcher's exit code."""
    resume = ["--resume"] if any(folder.glob("checkpoints/step-*/state.json")) else []
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    launcher += ["--num_gpus", str(ranks)]
    if importlib.util.find_spec("deepspeed") is None:
        launcher = [sys.executable]
    command = [*launcher, str(TRAIN), stage, *resume, f"output_dir={folder}", *settings]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TRAIN.parents[1]), os.environ.get("PYTHONPATH")]))
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{stage}.txt"
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        # without a terminal to draw on, the launcher's chatter goes to a file
        target = None if sys.stderr.isatty() else output
        code = subprocess.run(command, env=environment, stdout=target, stderr=target, check=False).returncode
    if code:
        sys.exit(f"error: training the {stage} ended with exit code {code}; its output is in {log}")
    return time.monotonic() - start


class Progress:
    """Records which parts are done and how long they took, in OUT/progress.json."""

    def __init__(self, out: Path) -> None:
        self.path = out / "progress.json"
        self.done: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, part: Any) -> None:
        """Runs a part and records it, unless it is done already."""
        if name in self.done:
            print(f"{name}: done before ({self.done[name]:.0f} s)", flush=True)
            return
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        part()
        self.done[name] = time.monotonic() - start
        write_json(self.path, self.done)
        print(f"{name}: {self.done[name]:.0f} s", flush=True)


def write_demo_report(out: Path, done: dict[str, float]) -> Path:
    """Writes OUT/report.html from the results in OUT, and returns it."""
    shipped, report, reconstruction = (
        json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("shipped", "evaluation", "reconstruction")
    )
    page = Page("ldmseg_fast: panoptic segmentation by latent diffusion, trained in minutes")
    cpu = f"{os.cpu_count()} CPU cores (threads: {torch.get_num_threads()})"
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu
    page.text(
        f"Made by make demo on {device}, Python {platform.python_version()}, PyTorch {torch.__version__}.", "note"
    )
    page.heading("Panoptic quality on held-out scenes")
    (_, *trained), *baselines = quality_rows(report)
    rows = [
        [f"the shipped model, {SHIPPED}", *quality_rows(shipped)[0][1:]],
        ["the model trained here", *trained],
        ["its mask auto-encoder alone (upper bound)", *quality_rows(reconstruction)[0][1:]],
        *baselines,
    ]
    page.table(["class-agnostic, %", "PQ", "SQ", "RQ"], rows, strong=0)
    thresholds = " / ".join(f"{value:g}" for value in report["thresholds"].values())
    page.text(
        f"{report['images']} scenes that neither model saw in training, {report['num_inference_steps']} denoising "
        f"steps ({shipped['num_inference_steps']} of the shipped model), thresholds {thresholds} (confidence / area in "
        f"pixels / overlap), {1000 * shipped['seconds_per_image']:.0f} ms per scene. "
        "The model trained here has seen scenes for as long as the last table says; its curves are below.",
        "note",
    )
    page.heading("The shipped model")
    page.picture((out / "shipped.png").read_bytes(), "image and segments on held-out scenes")
    for name, title in (("diffusion", "Diffusion model"), ("autoencoder", "Mask auto-encoder")):
        page.heading(title)
        page.picture(curves(out / name), f"{title}: loss and panoptic quality against the step")
        picture = last_picture(out / name)
        if picture:
            page.picture(picture, "image, truth, prediction on held-out scenes")
        page.details("settings", (out / name / "settings.txt").read_text(encoding="utf-8"))
    page.heading("Where the time went")
    page.table(["part", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in done.items()])
    path = out / "report.html"
    page.write(path)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--autoencoder-steps", type=int, default=600)
    parser.add_argument("--diffusion-steps", type=int, default=450)
    parser.add_argument("--images", type=int, default=100, help="held-out scenes to evaluate")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or min(2, os.cpu_count() or 1))


def run(args: argparse.Namespace) -> int:
    """Runs all parts and returns 0; a training that fails ends with its launcher's exit code."""
    from ldmseg_fast.commands.predict import find_pictures, predict_files
    from ldmseg_fast.data.folders import read_image
    from ldmseg_fast.data.scenes import write_scenes
    from ldmseg_fast.evaluation import EvaluationOptions, evaluate
    from ldmseg_fast.panoptic.format import read_panoptic_png
    from ldmseg_fast.pipeline import LDMSegPipeline
    from ldmseg_fast.reports.draw import enlarge, overlay, picture_grid

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    scenes, autoencoder, diffusion = out / "scenes", out / "autoencoder", out / "diffusion"
    common = ["--config", "tiny", f"data.root={scenes}", f"data.val_limit={args.images}"]
    progress = Progress(out)
    options = EvaluationOptions(limit=args.images)

    def use_shipped() -> None:
        write_json(out / "shipped.json", evaluate(SHIPPED, scenes, options))
        pipe = LDMSegPipeline.from_pretrained(SHIPPED)
        files = find_pictures([scenes / "val2017"])[:8]
        predict_files(pipe, files, out / "pictures", None, 0, 8)
        cells = []
        for file in files:
            image, ids = read_image(file), read_panoptic_png(out / "pictures" / f"{file.stem}.png")
            image, ids = enlarge(image, 256), enlarge(ids, 256)
            cells += [image, overlay(image, ids)]
        rows = [cells[start : start + 4] for start in range(0, len(cells), 4)]
        picture_grid(rows, ["image", "segments"] * 2).save(out / "shipped.png")

    def evaluate_trained() -> None:
        write_json(out / "evaluation.json", evaluate(diffusion, scenes, options))
        write_json(out / "reconstruction.json", evaluate(autoencoder, scenes, options))

    progress.run("scenes", lambda: write_scenes(scenes, args.scenes, 64, SCENES_SEED))
    progress.run("shipped model", use_shipped)
    steps, every = args.autoencoder_steps, max(args.autoencoder_steps // 3, 1)
    settings = [*common, f"train.steps={steps}", f"train.validate_every={every}", "train.save_every=200"]
    progress.run("autoencoder", lambda: launch_training("autoencoder", autoencoder, settings, args.ranks))
    steps, every = args.diffusion_steps, max(args.diffusion_steps // 3, 1)
    settings = [*common, f"train.steps={steps}", f"train.validate_every={every}", "train.save_every=150"]
    settings.append(f"model.mask_vae={autoencoder}")
    progress.run("diffusion", lambda: launch_training("diffusion", diffusion, settings, args.ranks))
    progress.run("evaluation", evaluate_trained)
    path = write_demo_report(out, progress.done)
    quality = {
        name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["class_agnostic"]["pq"]
        for name in ("shipped", "evaluation")
    }
    numbers = f"{quality['shipped']:.1f} shipped model, {quality['evaluation']:.1f} trained here"
    print(f"\nPQ on {args.images} held-out scenes: {numbers}\nreport: {path}")
    return 0
