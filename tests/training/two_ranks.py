"""Runs on every rank of one launch, because starting ranks takes far longer than what they do here.

two_ranks.py SCENES AUTOENCODER OUT SCENARIO...: each scenario is NAME or NAME:STAGE, a function below.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from ldmseg_fast import distributed
from ldmseg_fast.config import Config, load_config
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.training import muon
from ldmseg_fast.training.checkpoints import TrainingCheckpoints
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.noise_scale import MICRO, WHOLE
from ldmseg_fast.training.stages import STAGES
from ldmseg_fast.training.validation import validate

TINY = Path(__file__).with_name("tiny.yaml")
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # or ZeRO 3 would not cut parameters this small


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

    def muon(self, zero: str) -> None:
        """Counts the matrices that a rank turns in a step, or keeps the reason why it turns none."""
        config = self.settings(f"muon-{zero}", f"train.zero_stage={zero}", "train.optimizer=muon", "train.steps=3")
        turned: list[int] = []
        orthogonalize = muon.orthogonalize

        def weights_after_a_step() -> tuple[str, int]:
            run = Run("diffusion", config, Interrupt())
            run.take_step()
            weights = b"".join(parameter.detach().numpy().tobytes() for parameter in run.stage.parameters())
            hidden = len(list(muon.hidden_matrices(run.stage)))
            run.close()
            return hashlib.sha256(weights).hexdigest(), hidden

        found: Any
        try:
            with patch.object(muon, "orthogonalize", lambda matrix: turned.append(0) or orthogonalize(matrix)):
                shared, hidden = weights_after_a_step()
        except ConfigError as error:
            found = str(error)
        else:
            with patch.object(muon, "_share", lambda: (0, 1)):  # each turns all of them
                found = [len(turned), hidden, shared, weights_after_a_step()[0]]
        results = distributed.gather_objects(found)
        if distributed.is_main():
            (self.out / f"muon-{zero}.json").write_text(json.dumps(results))

    def fp16(self, zero: str) -> None:
        """Loss scaling, by our own scale, under ZeRO."""
        settings = ["train.precision=fp16", f"train.zero_stage={zero}", "train.steps=3"]
        train("diffusion", self.settings(f"fp16-{zero}", *settings))

    def bf16(self, zero: str) -> None:
        """Self-conditioning's first pass must leave nothing in autocast's cache that ZeRO 3 frees."""
        settings = ["train.precision=bf16", f"train.zero_stage={zero}", "train.steps=4"]
        train("diffusion", self.settings(f"bf16-{zero}", *settings), deepspeed_config=CUT if zero == "3" else None)

    def offload(self, zero: str) -> None:
        settings = ["train.offload=true", f"train.zero_stage={zero}", "train.steps=3"]
        train("diffusion", self.settings(f"offload-{zero}", *settings))

    def compiled(self, zero: str, backend: str = "aot_eager") -> None:
        settings = ["train.compile=blocks", f"train.compile_backend={backend}", f"train.zero_stage={zero}"]
        name = "compiled" if backend == "aot_eager" else backend
        train("diffusion", self.settings(f"{name}-{zero}", *settings, "train.steps=3"))

    def inductor(self, zero: str) -> None:
        self.compiled(zero, "inductor")

    def noise(self, zero: str) -> None:
        """Squared norms of each rank's own gradient, and of the gradient that they share."""
        config = self.settings(f"noise-{zero}", "train.noise_scale=true", f"train.zero_stage={zero}")
        run = Run("diffusion", config, Interrupt(), user_config=CUT if zero == "3" else None)
        totals = run.take_step()
        squares = distributed.gather_objects({name: float(totals[name]) for name in (MICRO, WHOLE)})
        if distributed.is_main():
            (self.out / f"noise-{zero}.json").write_text(json.dumps(squares))
        run.close()

    def trust(self, zero: str) -> None:
        """DeepSpeed's own checkpoint: refused, and with trust resumed from."""
        config = self.settings(f"trust-{zero}", f"train.zero_stage={zero}", "train.steps=4")
        run = Run("autoencoder", config, Interrupt())
        run.take_step()
        run.take_step()
        run.optimizer.engine.save_checkpoint(config.output_dir, tag="global_step2")
        before = [shard.weight.clone() for shard in run.optimizer.shards]
        run.close()
        try:
            train("autoencoder", config, resume=True)
            raise AssertionError("a pickle was read")
        except CheckpointError as error:
            assert "--trust" in str(error), error
        run = Run("autoencoder", config, Interrupt(), resume=True, trust=True)
        assert run.progress.step == 2 and run.optimizer.counters()["adam_steps"] == 2
        assert all(bool((shard.weight == old).all()) for shard, old in zip(run.optimizer.shards, before))
        run.loop()
        run.close()

    def validation(self, zero: str) -> None:
        """Metrics and maps on 24 scenes, two chunks for two ranks."""
        found = measured(self.settings("validation", f"train.zero_stage={zero}"))
        if distributed.is_main():
            (self.out / "validation.json").write_text(json.dumps(found))

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


def measured(config: Config) -> dict[str, Any]:
    """What `validate` returns for shifted truths, which have a quality, and a digest of each map that the untrained
    network makes, which has none."""
    torch.manual_seed(0)
    stage = STAGES["diffusion"](config)
    predict, digests = stage.predict, {}

    def shifted(batch: dict[str, Any], sizes: list[tuple[int, int]]) -> list[PanopticResult]:
        for image_id, result in zip(batch["image_id"], predict(batch, sizes)):
            digests[str(image_id)] = hashlib.sha256(result.segmentation.tobytes()).hexdigest()
        maps = [
            np.roll(ids.numpy().astype(np.int32), 1 + place % 3, axis=1)
            for place, ids in enumerate(batch["segment_ids"])
        ]
        return [
            PanopticResult(ids, [{"id": int(i), "category_id": 1, "iscrowd": 0} for i in np.unique(ids) if i])
            for ids in maps
        ]

    stage.predict = shifted  # type: ignore[method-assign]
    dataset = CocoPanoptic(config.data.root, "train2017", 32, num_slots=32)
    values = validate(stage, dataset, distributed.device(), None)
    for part in distributed.gather_objects(digests):
        digests |= part
    return values | {"maps": dict(sorted(digests.items()))}


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
