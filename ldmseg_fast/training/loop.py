"""Runs the training loop, one for all stages: data -> loss -> step -> log -> validate -> save.

It stands on top of the optimizer and the checkpoints, these on the stages, and the stages on the losses.
"""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.config import Config, TrainConfig, describe, to_dict
from ldmseg_fast.data.latent_cache import ShardCheck, attach_cache
from ldmseg_fast.data.loader import Prefetcher
from ldmseg_fast.distributed.liveness import Agreement, Heartbeat, Interrupt
from ldmseg_fast.errors import Stopped, printable, why_out_of_memory
from ldmseg_fast.files import replacing, write_json
from ldmseg_fast.kernels.backend import KERNELS, set_backend, turn_off_on_old_gpus
from ldmseg_fast.threads import cores
from ldmseg_fast.training.cache_memory import fit_caches
from ldmseg_fast.training.checkpoints import Progress, TrainingCheckpoints
from ldmseg_fast.training.compilation import compile_stage
from ldmseg_fast.training.disk import check_disk
from ldmseg_fast.training.exported import exported_step, note_exported
from ldmseg_fast.training.faults import BadItems, NonFiniteGuard, out_of_memory
from ldmseg_fast.training.fp8 import train_in_fp8
from ldmseg_fast.training.inputs import (
    check_batch,
    check_output_dir,
    make_batches,
    not_held_out,
    pin_hub_names,
    sets_of,
    training_set,
    use_categories,
    validation_sets,
)
from ldmseg_fast.training.machine import SETTINGS_VERSION, peak_memory, resolve_settings
from ldmseg_fast.training.noise_scale import NoiseMeter
from ldmseg_fast.training.operations import operation_rates
from ldmseg_fast.training.optimizer import make_optimizer
from ldmseg_fast.training.pace import Pace
from ldmseg_fast.training.provenance import record_start
from ldmseg_fast.training.run_log import RunLog, Window
from ldmseg_fast.training.stages import STAGES
from ldmseg_fast.training.validation import mean_of_sets, validate


def learning_rate(step: int, config: TrainConfig, time_used: float = 0.0) -> float:
    """Computes the learning rate of 0-based `step`.

    After a linear warm-up it is constant, follows a cosine, or is a tenth for the last tenth of the run.
    time_used: the share of `train.max_minutes` that is over; the schedule follows it where it is ahead of the steps.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = min(max((step - config.warmup) / max(config.steps - config.warmup, 1), time_used), 1.0)
    if config.schedule == "cosine":  # Loshchilov & Hutter 2017, equation 5
        share = config.min_lr + (1.0 - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "step":
        share = 0.1 if progress >= 0.9 else 1.0
    else:
        share = 1.0
    return config.learning_rate * share


class Run:
    """Holds one training run from its settings to its model folder; `loop` is the whole story.

    Arguments and errors as `train` has them; `interrupt` tells that a signal has come.
    """

    def __init__(
        self,
        stage_name: str,
        config: Config,
        interrupt: Interrupt,
        resume: bool = False,
        user_config: dict[str, Any] | None = None,
        trust: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.folder, self.device, self.interrupt = Path(config.output_dir), distributed.device(), interrupt
        settings = config.train
        self.checkpoints = TrainingCheckpoints(self.folder / "checkpoints", settings.keep, settings.keep_best)
        self.checkpoints.check_start(resume, trust)
        config, precision = resolve_settings(config, self.device, self.folder if resume else None)
        torch.set_num_threads(settings.threads or max(1, cores() // distributed.local_size()))
        torch.manual_seed(settings.seed)
        random.seed(settings.seed)  # nothing of ours draws from these two, but checkpoints keep them
        np.random.seed(settings.seed % 2**32)  # noqa: NPY002
        for kernel in KERNELS:
            set_backend(kernel, "auto" if config.model.kernels else "torch")
        turn_off_on_old_gpus(self.device)

        self.stage = STAGES[stage_name](config).to(self.device)
        self.config = config = self.stage.config  # with what pre-trained folders say
        if settings.channels_last and not distributed.launched():
            self.stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        num_slots = self.stage.mask_vae.config.num_slots
        self.train_set = training_set(config, num_slots)
        self.val_sets = validation_sets(config, num_slots)
        train_sets = sets_of(self.train_set)
        use_categories(self.stage, train_sets, self.val_sets.values(), self.folder if resume else None)
        self.shard_check: ShardCheck | None = None
        if stage_name != "autoencoder":
            cache = attach_cache(train_sets[0], config, self.stage.get_submodule("image_vae"), self.say)
            self.shard_check = None if cache is None else ShardCheck(cache)
        check_batch(config)
        if settings.fp8:
            precision += f"; {train_in_fp8(getattr(self.stage, 'unet', None))}"
        compile_stage(self.stage, settings.compile, settings.compile_backend)
        self.optimizer = make_optimizer(self.stage, config, user_config)
        self.noise = NoiseMeter(self.stage, settings, distributed.world_size()) if settings.noise_scale else None
        self.progress = Progress(stage_name)
        if resume:
            self.progress = self.checkpoints.load(self.stage, self.optimizer, stage_name, self.say)
            self.say(f"resumed at step {self.progress.step} of {settings.steps}")
            self.bring_up_to_date()
        forecast = check_disk(self.folder, self.stage, settings, self.progress.step)
        self.stage.train()

        categories = self.stage.mask_vae.config.num_categories
        cached = fit_caches(train_sets, self.val_sets.values(), config.data.num_workers, categories)
        self.batches = make_batches(self.train_set, config, self.progress.items)
        self.prefetched = Prefetcher(self.batches, self.device, settings.accumulation)
        self.bad_items = BadItems(len(self.train_set), config.data.bad_items)
        logs = self.folder / "logs"
        self.guard = NonFiniteGuard(logs / f"nonfinite-{distributed.rank()}.jsonl", settings.max_skipped)
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {"stage": stage_name, "settings_version": SETTINGS_VERSION}
            write_json(self.folder / "config.json", about | to_dict(config))
            record_start(logs, stage_name, self.progress.step)
            with replacing(self.folder / "settings.txt") as temporary:
                temporary.write_text("\n".join(describe(config)) + "\n", encoding="utf-8")
        trackers = {"wandb": settings.wandb, "mlflow": settings.mlflow, "trackio": settings.trackio}
        self.log = RunLog(logs, self.progress.step, settings=to_dict(config), **trackers)
        for line in filter(None, (*notes, precision, forecast, cached)):
            self.say(line)
        for warning in not_held_out(config):
            self.say(f"warning: {warning}")
        self.agreement, self.window = Agreement(), Window()
        self.started, self.cpu_started = time.monotonic(), time.process_time()
        self.seconds_before, self.rate = self.progress.seconds, 0.0
        self.pace = Pace(config)
        quiet = None if distributed.is_main() else True  # None: silent where there is no terminal
        self.bar = tqdm(total=settings.steps, initial=self.progress.step, desc=stage_name, unit="step", disable=quiet)

    def loop(self) -> None:
        """Trains until train.steps or train.max_minutes, which end the run, or a signal, which interrupts it."""
        settings, progress = self.config.train, self.progress
        if progress.validation_due:
            self.validate()
            self.save()
        stop = self.over() or progress.validation_due
        while not stop:
            self.window.add(self.take_step())
            stop, bad_items, seconds = self.agreement.exchange(
                self.interrupt.requested, len(self.bad_items.messages), time.process_time() - self.cpu_started
            )
            progress.seconds = self.seconds_before + seconds
            last = self.over()
            self.bad_items.check(bad_items)
            if progress.step % settings.log_every == 0 or last:
                self.write_log()
            improved = False
            if last or (progress.step % settings.validate_every == 0 and self.pace.may_validate(progress.seconds)):
                progress.validation_due = True
                improved = (last or not stop) and self.validate()
            stop = stop or last or progress.validation_due
            if progress.step % settings.save_every == 0 or stop or (improved and settings.keep_best > 0):
                self.save()
        averages = self.optimizer.averages
        if averages is not None and averages.powers:
            own = averages.values
            choices = {f"width-{width:g}": values for width, values in averages.powers.items()}
            choices["none"] = [shard.weight.detach().float().clone() for shard in averages.shards]
            for count in (2, 3, 5):
                choices[f"last-{count}"] = [torch.stack(each).mean(0) for each in zip(*averages.last[-count:])]
            for name, values in choices.items():
                averages.values = values
                with self.optimizer.averaged_weights():
                    self.stage.save(Path(self.config.output_dir + "-" + name))
            averages.values = own
        self.interrupt.agree()  # a signal to one rank ends all of them in the same way

    def over(self) -> bool:
        """Whether the run has reached its end."""
        return self.progress.step >= self.config.train.steps or self.time_used() >= 1.0

    def time_used(self) -> float:
        """Share of train.max_minutes that is over, on every rank the same; 0 without a limit."""
        minutes = self.config.train.max_minutes
        return self.progress.seconds / (60 * minutes) if minutes > 0 else 0.0

    def take_step(self) -> dict[str, Tensor]:
        """Takes one optimiser step over `accumulation` micro-batches.

        Returns:
            This rank's losses by name, averaged over the micro-batches: float scalars on the device.
        """
        settings, progress = self.config.train, self.progress
        self.rate = learning_rate(progress.step, settings, self.time_used())
        self.optimizer.set_learning_rate(self.rate)
        totals: dict[str, Tensor] = {}
        if self.shard_check is not None:
            self.shard_check.raise_if_damaged()
        batches = next(self.prefetched)
        for message in self.bad_items.add([failure for batch in batches for failure in batch["failures"]]):
            tqdm.write(printable(f"warning: {message}; another image takes its place"), file=sys.stderr)
        self.stage.prepare(batches)
        for number, batch in enumerate(batches, 1):
            losses = self.optimizer.forward(batch, progress.step)
            self.optimizer.backward(losses["loss"], last=number == len(batches))
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + value.detach() / len(batches)
        self.prefetched.fetch()
        image_ids = [image_id for batch in batches for image_id in batch["image_id"]]
        loss_scale = self.optimizer.scale.value
        skipped = self.optimizer.step()
        norm = torch.as_tensor(self.optimizer.grad_norm, device=totals["loss"].device).detach().float()
        totals["grad_norm"] = torch.where(torch.isfinite(norm), norm, 0.0)
        if self.noise is not None:
            totals |= self.noise.of_step(norm, loss_scale)
        progress.step, progress.items = progress.step + 1, progress.items + settings.batch_size
        self.settle(self.guard.watch(progress.step, image_ids, totals["loss"], skipped))
        self.bar.update()
        return totals

    def settle(self, verdicts: list[bool]) -> None:
        """Takes note of which steps were skipped."""
        for skipped in verdicts:
            self.optimizer.scale.update(skipped)
            self.progress.skipped += skipped

    def write_log(self) -> None:
        """Writes a line of the log; all ranks call it."""
        values = self.window.means(self.config.train.batch_size)
        seconds = max(time.monotonic() - self.window.started, 1e-9)
        if self.noise is not None:
            self.noise.of_window(values, self.window.steps)
        values["lr"] = self.rate
        values["data_wait"] = self.batches.waited / seconds  # share of the time
        values |= operation_rates(self.progress.stage, self.config, values["images_per_s"] / distributed.world_size())
        values["left_seconds"] = self.pace.left(self.progress.step, self.progress.seconds, seconds / self.window.steps)
        if warning := self.pace.data_warning(values["data_wait"]):
            self.say(warning)
        values["cpu_seconds"] = time.process_time() - self.cpu_started
        values["seconds"] = self.progress.seconds
        if self.progress.skipped:
            values["skipped"] = self.progress.skipped
        if self.optimizer.scale.enabled:
            values["loss_scale"] = self.optimizer.scale.value
        values["memory_gib"] = peak_memory() / 2**30
        if self.device.type == "cuda":
            values["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_s']:.0f}")
        self.log.write(self.progress.step, values)
        self.batches.waited, self.window = 0.0, Window()

    def validate(self) -> bool:
        """Validates, and tells whether the averaged weights are the best so far.

        Of several sets each has numbers of its own in the log, val/NAME/pq and so on; val/pq is their mean. A stop
        request ends it without a result; it is due then.
        """
        step, started = self.progress.step, time.monotonic()
        several, pictures = len(self.val_sets) > 1, {}
        found: dict[str, dict[str, float]] = {}
        metrics: dict[str, float] | None = None
        for name, dataset in self.val_sets.items():
            tail = f"-{name}" if several else ""
            pictures[name] = self.folder / "pictures" / f"step-{step:08d}{tail}.png"
            with self.optimizer.averaged_weights():
                metrics = validate(
                    self.stage,
                    dataset,
                    self.device,
                    pictures[name],
                    timeout=self.config.data.timeout,
                    stop=lambda: self.interrupt.requested,
                )
            if metrics is None:
                break
            found[name] = metrics
        if metrics is not None and several:
            metrics = mean_of_sets(found)
        self.progress.validation_due = metrics is None
        if metrics is None:
            self.say(f"step {step}: validation interrupted; --resume begins with it")
            return False
        # rank 0's, because all have to decide alike
        self.pace.validated(self.progress.seconds, distributed.broadcast_object(time.monotonic() - started))
        self.log.write(step, metrics)
        if distributed.is_main():
            for name, path in pictures.items():
                if path.is_file():
                    self.log.picture(step, path, f"validation/{name}" if several else "validation")
            if not self.bar.disable:
                self.say(f"step {step}: " + "  ".join(f"{key} {value:.2f}" for key, value in metrics.items()))
        score = metrics[f"val/{self.config.train.best}"]
        improved = score > max(self.progress.best.values(), default=-1.0)
        self.progress.best[step] = score
        self.window, self.batches.waited = Window(), 0.0
        return improved

    def save(self) -> None:
        """Saves a checkpoint to go on from, then the averaged weights as a model folder, and as the best one."""
        self.settle(self.guard.flush())
        self.checkpoints.save(self.stage, self.optimizer, self.progress)
        self.export(self.folder)
        if self.config.train.keep_best and self.progress.best_step() == self.progress.step:
            self.export(self.folder / "best")
        self.window, self.batches.waited = Window(), 0.0

    def bring_up_to_date(self) -> None:
        """Writes the model folders that a kill has left behind the checkpoint that was loaded; all ranks call it."""
        step, is_best = self.progress.step, self.progress.best_step() == self.progress.step
        for folder in (self.folder, self.folder / "best")[: 1 + (is_best and self.config.train.keep_best > 0)]:
            if distributed.broadcast_object(exported_step(folder, self.checkpoints.folder)) != step:
                self.say(f"{folder} is not the model of step {step}: written anew from the checkpoint")
                self.export(folder)

    def export(self, folder: Path) -> None:
        """Writes the averaged weights as a model folder; all ranks call it."""

        def write() -> None:
            note_exported(folder, self.checkpoints.folder, None)
            self.stage.save(folder)
            note_exported(folder, self.checkpoints.folder, self.progress.step)

        with self.optimizer.averaged_weights(), self.optimizer.whole_parameters():
            distributed.run_on_main(write)

    def say(self, message: str) -> None:
        """Prints a line on rank 0, above the progress bar."""
        if distributed.is_main():
            tqdm.write(printable(message), file=sys.stderr)

    def close(self) -> None:
        """Closes the bar, the log and the loader."""
        self.bar.close()
        self.log.close()
        self.batches.close()


def train(
    stage_name: str,
    config: Config,
    resume: bool = False,
    deepspeed_config: dict[str, Any] | None = None,
    trust: bool = False,
    notes: Sequence[str] = (),
) -> Path:
    """Trains one stage.

    Args:
        stage_name: of `stages.STAGES`.
        config: everything; `output_dir` becomes the MODEL_DIR.
        resume: continue from the newest whole checkpoint in `output_dir`.
        deepspeed_config: a user's DeepSpeed settings, merged with ours.
        trust: a checkpoint that DeepSpeed itself pickled may be resumed from.
        notes: lines that the run says at its start.

    Returns:
        The model folder.

    Raises:
        ConfigError: settings that cannot work here.
        CheckpointError: nothing to resume, a checkpoint of another architecture, a run in the way, a full disk.
        ArgumentError: an output_dir that the run reads from.
        InUseError: another training writes into output_dir.
        DataError: a data set that cannot be read.
        NonFiniteError: too many steps in a row without finite gradients.
        OutOfMemory: with the settings that help most.
        Stopped: SIGTERM or SIGINT came; the run has saved.
    """
    folder = Path(config.output_dir)
    config = pin_hub_names(config, folder if resume else None)
    check_output_dir(config)
    with (
        Interrupt() as interrupt,
        Heartbeat(config.train.peer_timeout, lambda: interrupt.request(signal.SIGTERM)),
        distributed.only_writer_on_main(folder, "a training", "stop it, or take another output_dir", make=not resume),
    ):
        run = None
        try:
            run = Run(stage_name, config, interrupt, resume, deepspeed_config, trust, notes)
            run.loop()
        except Exception as error:
            if reason := why_out_of_memory(error):
                raise out_of_memory(stage_name, config, distributed.world_size(), reason) from error
            raise
        finally:
            if run is not None:
                run.close()
    if interrupt.requested and (not run.over() or run.progress.validation_due):
        raise Stopped(run.progress.step, interrupt.signal)
    return run.folder
