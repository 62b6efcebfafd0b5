"""Training checkpoints: OUTPUT_DIR/checkpoints/step-00000500/, each complete or not there at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ldmseg_fast import distributed
from ldmseg_fast.checkpoint import CheckpointError, read_json, write_json
from ldmseg_fast.optimizer import Optimizer
from ldmseg_fast.stages import Stage


class TrainingCheckpoints:
    """The checkpoints of one run. `state.json` is written last, so a folder without it is incomplete."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending."""
        found = []
        for path in self.folder.glob("step-*"):
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match and (path / "state.json").is_file():
                found.append(int(match[1]))
        return sorted(found)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def check_start(self, resume: bool) -> None:
        """Raises CheckpointError where there is nothing to resume, or where a fresh start would hide an older run."""
        steps = self.steps()
        if resume and not steps:
            raise CheckpointError(f"--resume: no complete checkpoint in {self.folder}; start without --resume")
        if not resume and steps:
            raise CheckpointError(
                f"{self.folder.parent} holds a run at step {steps[-1]}; continue it with --resume or take another output_dir"
            )

    def save(self, stage: Stage, optimizer: Optimizer, step: int) -> None:
        """Write the checkpoint of `step` and drop the oldest; all ranks call it."""
        temporary = self.folder / f".new-{step:08d}"
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        optimizer.save(temporary, stage)
        distributed.barrier()
        if distributed.is_main():
            write_json(temporary / "state.json", {"step": step, "world_size": distributed.world_size()})
            shutil.rmtree(self.path(step), ignore_errors=True)
            temporary.rename(self.path(step))
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        distributed.barrier()

    def load(self, stage: Stage, optimizer: Optimizer) -> int:
        """Load the newest checkpoint; returns its step."""
        step = self.steps()[-1]
        state = read_json(self.path(step) / "state.json")
        if state["world_size"] != distributed.world_size():
            raise CheckpointError(
                f"{self.path(step)} was written by {state['world_size']} ranks, this run has {distributed.world_size()}; "
                f"start it with as many"
            )
        optimizer.load(self.path(step), stage)
        return step
