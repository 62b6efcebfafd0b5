"""The page that `make demo` ends with: what the shipped model does, and what the trainings reached in their time."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.run_records import read_log
from ldmseg_fast.files import read_json, read_lines
from ldmseg_fast.reports.page import Page
from ldmseg_fast.reports.run_page import curves, last_picture, quality_rows

STAGES = {"diffusion": "Diffusion model", "autoencoder": "Mask auto-encoder"}


def newest_losses(run: Path) -> dict[str, Any]:
    """Reads the newest record of a run's log that holds losses, with its step and the wall seconds of training."""
    return [record for record in read_log(run) if "loss" in record][-1]


def write_demo_page(out: Path, done: dict[str, dict[str, float]], minutes: float) -> Path:
    """Writes OUT/report.html from what the parts of the demo left in `out`.

    Args:
        out: the demo's folder.
        done: wall seconds (`seconds`) and processor seconds (`processor_seconds`) of each part.
        minutes: what all parts together were allowed.

    Returns:
        The file.
    """
    reports = {
        name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("shipped", "evaluation", "reconstruction")
    }
    machine = read_lines(out / "diffusion" / "logs" / "starts.jsonl")[-1]["machine"]
    load = " / ".join(f"{value:.1f}" for value in os.getloadavg())
    page = Page("ldmseg_fast: panoptic segmentation by latent diffusion, trained in minutes")
    page.text(
        f"Made by make demo on {machine}, Python {platform.python_version()}, load average {load} over the last 1 / 5 "
        f"/ 15 minutes.",
        "note",
    )
    page.heading("Panoptic quality on held-out scenes")
    _quality(page, reports)
    page.heading("The shipped model")
    page.picture((out / "shipped.png").read_bytes(), "image and segments on held-out scenes")
    page.heading("What the trainings reached")
    _trainings(page, out)
    page.picture((out / "evaluation.png").read_bytes(), "image and segments of the model trained here")
    for name, title in STAGES.items():
        page.heading(title)
        page.picture(curves(out / name), f"{title}: loss and panoptic quality against the step")
        picture = last_picture(out / name)
        if picture:
            page.picture(picture, "image, truth, prediction on held-out scenes")
        page.details("settings", (out / name / "settings.txt").read_text(encoding="utf-8"))
    page.heading("Where the time went")
    keys = ("seconds", "processor_seconds")
    rows = [[name, *(f"{part[key]:.0f}" for key in keys)] for name, part in done.items()]
    rows.append(["all", *(f"{sum(part[key] for part in done.values()):.0f}" for key in keys)])
    page.table(["part", "seconds", "processor seconds"], rows, strong=len(rows) - 1)
    page.text(f"{60 * minutes:.0f} seconds were allowed. For another number: rm -r demo; make demo MINUTES=N.", "note")
    path = out / "report.html"
    page.write(path)
    return path


def _quality(page: Page, reports: dict[str, dict[str, Any]]) -> None:
    (_, *trained), *baselines = quality_rows(reports["evaluation"])
    names = {"shipped": "the shipped model", "reconstruction": "its mask auto-encoder alone (upper bound)"}
    own = {key: [name, *quality_rows(reports[key])[0][1:]] for key, name in names.items()}
    rows = [own["shipped"], ["the model trained here", *trained], own["reconstruction"], *baselines]
    counts = [str(reports[key]["images"]) for key in ("shipped", "evaluation", "reconstruction")]
    counts += [counts[1]] * len(baselines)
    page.table(["class-agnostic, %", "PQ", "SQ", "RQ", "scenes"], [[*row, n] for row, n in zip(rows, counts)], strong=0)
    thresholds = " / ".join(f"{value:g}" for value in reports["evaluation"]["thresholds"].values())
    page.text(
        f"No model saw these scenes in training. The model trained here takes "
        f"{reports['evaluation']['num_inference_steps']} denoising steps, the shipped one "
        f"{reports['shipped']['num_inference_steps']}. Thresholds: {thresholds} (confidence / area in pixels / "
        f"overlap). On one thread the shipped model takes {1000 * reports['shipped']['seconds_per_image']:.0f} ms a "
        f"scene, the one trained here {1000 * reports['evaluation']['seconds_per_image']:.0f} ms.",
        "note",
    )


def _trainings(page: Page, out: Path) -> None:
    rows = []
    for name, title in reversed(STAGES.items()):
        config, last = read_json(out / name / "config.json")["train"], newest_losses(out / name)
        seen = last["step"] * config["batch_size"]
        time = f"{last['seconds'] / 60:.1f} of {config['max_minutes']:.1f}"
        ended = "steps" if last["step"] >= config["steps"] else "time"
        numbers = [str(last["step"]), str(seen), f"{last['loss']:.3f}", time, config["precision"], ended]
        rows.append([title, *numbers])
    page.table(["training", "steps", "pictures", "loss", "minutes", "precision", "ended by"], rows)
    page.text(
        "Each training ends when its time is over; its learning rate has fallen to zero by then. Minutes are enough "
        "to see both losses fall. A diffusion model that segments well needs more of them: the shipped one's card "
        "says how it was trained.",
        "note",
    )
