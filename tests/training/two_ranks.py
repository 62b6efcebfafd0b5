"""Runs on every rank of one launch, because starting ranks takes far longer than what they do here.

two_ranks.py SCENES AUTOENCODER OUT SCENARIO...: each scenario is NAME or NAME:STAGE, a function below.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from ldmseg_fast import distributed
from ldmseg_fast.config import Config, load_config
from ldmseg_fast.engine import Run, make_dataset, train
from ldmseg_fast.resume import TrainingCheckpoints
from ldmseg_fast.stages import STAGES
from ldmseg_fast.training.liveness import Interrupt
from ldmseg_fast.training.validation import validate

TINY = Path(__file__).with_name("tiny.yaml")
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # or ZeRO 3 would not cut parameters this small
LOOSE = ["data.val_limit=0", "postprocess.mask_threshold=0", "postprocess.overlap_threshold=0"]  # or PQ is 0


class Scenarios:
    def __init__(self, scenes: Path, autoencoder: Path, out: Path) -> None:
        self.scenes, self.autoencoder, self.out = scenes, autoencoder, out

    def settings(self, name: str, *overrides: Any) -> Config:
        fixed = [f"data.root={self.scenes}", f"output_dir={self.out / name}", f"model.mask_vae={self.autoencoder}"]
        return load_config(str(TINY), [*fixed, "train.threads=1", *overrides])

    def resume(self, zero: str) -> None:
        """A run of 8 steps, and the same cut at step 4 and resumed."""
        config = self.settings(f"whole-{zero}", f"train.zero_stage={zero}", "train.ema=0.9")
        train("diffusion", config, deepspeed_config=CUT if zero == "3" else None)
        cut = self.out / f"cut-{zero}"
        if distributed.is_main():
            shutil.copytree(config.output_dir, cut)
            shutil.rmtree(cut / "checkpoints" / "step-00000008")
        distributed.barrier()
        config = self.settings(f"cut-{zero}", f"train.zero_stage={zero}")
        train("diffusion", config, resume=True, deepspeed_config=CUT if zero == "3" else None)

    def resave(self, zero: str) -> None:
        """Load the checkpoint of a run on one rank, in OUT/to-resave, and save it again."""
        config = self.settings("to-resave", f"train.zero_stage={zero}")
        run = Run("diffusion", config, Interrupt(), resume=True, user_config=CUT if zero == "3" else None)
        TrainingCheckpoints(self.out / f"resaved-{zero}", 9).save(run.stage, run.optimizer, run.progress)
        run.close()

    def stage(self, zero: str) -> None:
        """Few steps and a validation, of the auto-encoder."""
        config = self.settings(f"stage-{zero}", f"train.zero_stage={zero}", "train.steps=4", "train.validate_every=4")
        train("autoencoder", config, deepspeed_config=CUT if zero == "3" else None)

    def accumulation(self, zero: str) -> None:
        settings = ["train.accumulation=2", f"train.zero_stage={zero}", "train.steps=4"]
        train("diffusion", self.settings(f"accumulation-{zero}", *settings))

    def fp16(self, zero: str) -> None:
        """Loss scaling, by our own scale, under ZeRO."""
        settings = ["train.precision=fp16", f"train.zero_stage={zero}", "train.steps=3"]
        train("diffusion", self.settings(f"fp16-{zero}", *settings))

    def validation(self, zero: str) -> None:
        """Metrics of an untrained model on 24 scenes, two chunks for two ranks."""
        config = self.settings("validation", *LOOSE, f"train.zero_stage={zero}")
        dataset = make_dataset(config, "train2017", 32, train=False)
        values = validate(STAGES["diffusion"](config), dataset, distributed.device(), None)
        if distributed.is_main():
            (self.out / "validation.json").write_text(json.dumps(values))

    def nonfinite(self, zero: str) -> None:
        """A NaN on one rank in step 2: every rank skips that step, and none of the others."""
        run = Run("autoencoder", self.settings(f"nonfinite-{zero}", f"train.zero_stage={zero}"), Interrupt())
        before = None
        for step in range(4):
            if step == 2:
                before = [shard.weight.clone() for shard in run.optimizer.shards]
                spoil(run, rank=1)
            run.take_step()
            if step == 2:
                same = all((shard.weight == old).all() for shard, old in zip(run.optimizer.shards, before or []))
                results = distributed.gather_objects((bool(same), run.progress.skipped))
                if distributed.is_main():
                    (self.out / f"nonfinite-{zero}.json").write_text(json.dumps(results))
        run.close()


def spoil(run: Run, rank: int, value: float = float("nan")) -> None:
    """Multiply the next loss of `rank` by a number that is none."""
    forward = run.optimizer.forward

    def spoiled(batch: dict[str, Any], step: int) -> dict[str, Any]:
        run.optimizer.forward = forward  # type: ignore[method-assign]
        losses = forward(batch, step)
        if distributed.rank() == rank:
            losses["loss"] = losses["loss"] * value
        return losses

    run.optimizer.forward = spoiled  # type: ignore[method-assign]


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    scenes, autoencoder, out = map(Path, arguments[:3])
    distributed.start(minutes=2)
    scenarios = Scenarios(scenes, autoencoder, out)
    for scenario in arguments[3:]:
        name, _, zero = scenario.partition(":")
        try:
            getattr(scenarios, name)(zero or "1")
        except Exception:
            (out / f"failed-{scenario}-{distributed.rank()}").write_text(traceback.format_exc())
        distributed.barrier()
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
