"""`ldmseg runs DIR` lists the trainings below a folder, with how far they are and their best panoptic quality."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.run_records import LOG, read_log
from ldmseg_fast.commands.options import add_json_argument, print_json
from ldmseg_fast.files import read_text


@dataclass(frozen=True)
class RunSummary:
    """Sums up one training. Quantities that it has not logged yet are None; `best_pq` is in percent."""

    name: str
    stage: str
    step: int
    steps: int
    loss: float | None
    images_per_s: float | None
    best_pq: float | None
    best_step: int | None
    checkpoint: int | None  # newest complete one
    time_used: float = 0.0  # share of train.max_minutes

    @property
    def state(self) -> str:
        """Says whether the run has finished, or can go on from a checkpoint."""
        if self.step >= self.steps > 0 or self.time_used >= 1:
            return "finished"
        return "resumable" if self.checkpoint is not None else "no checkpoint"


def find_runs(folder: Path) -> list[RunSummary]:
    """Lists all runs in `folder`, itself included, by name.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that holds output_dirs of trainings")
    return [summarize(path.parent.parent, folder) for path in sorted(folder.rglob(str(LOG)))]


def summarize(run: Path, base: Path) -> RunSummary:
    """Sums up the run in the folder `run`; its name is relative to `base`."""
    records = read_log(run)
    config = _json(run / "config.json")
    steps, minutes = (_number(config.get("train"), name) for name in ("steps", "max_minutes"))
    losses = [record for record in records if "loss" in record]
    validated = [record for record in records if "val/pq" in record]
    best = max(validated, key=lambda record: record["val/pq"], default={})
    last: dict[str, Any] = losses[-1] if losses else {}
    numbers = [path.parent.name[5:] for path in run.glob("checkpoints/step-*/manifest.json")]
    checkpoints = [int(number) for number in numbers if number.isdecimal()]
    return RunSummary(
        name="." if run == base else run.relative_to(base).as_posix(),
        stage=str(config.get("stage", "?")),
        step=last.get("step", 0),
        steps=int(steps),
        loss=last.get("loss"),
        images_per_s=last.get("images_per_s"),
        best_pq=best.get("val/pq"),
        best_step=best.get("step"),
        checkpoint=max(checkpoints, default=None),
        time_used=last.get("seconds", 0.0) / (60 * minutes) if minutes else 0.0,
    )


def format_table(runs: list[RunSummary]) -> str:
    """Formats a row a run, the best panoptic quality first."""
    head = ["run", "stage", "step", "of", "loss", "images/s", "best PQ", "at step", "state"]
    rows = [head]
    for run in sorted(runs, key=lambda run: -(run.best_pq if run.best_pq is not None else -1.0)):
        numbers = [
            _text(run.loss, ".4f"),
            _text(run.images_per_s, ".0f"),
            _text(run.best_pq, ".2f"),
            _text(run.best_step, "d"),
        ]
        rows.append([run.name, run.stage, str(run.step), str(run.steps), *numbers, run.state])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in (0, 1, 8) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _text(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _number(settings: Any, name: str) -> float:
    value: Any = settings.get(name) if isinstance(settings, dict) else None
    return value if type(value) in (int, float) and isfinite(value) else 0


EXAMPLES = (
    "ldmseg runs runs",
    "ldmseg runs runs --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="holds output_dirs of trainings, at any depth")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the runs and returns 1 where there is none."""
    runs = find_runs(args.folder)
    if args.json:
        print_json([asdict(run) | {"state": run.state} for run in runs])
    else:
        print(format_table(runs) if runs else f"no run in {args.folder}")
    return 0 if runs else 1
