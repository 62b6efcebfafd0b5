"""The training loop, one for both stages: data -> loss -> step -> log -> validate -> save."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.checkpoint import write_json
from ldmseg_fast.config import Config, ConfigError, TrainConfig, describe, to_dict
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.sampler import EpochSampler
from ldmseg_fast.data.transforms import Augmentation
from ldmseg_fast.draw import enlarge, overlay, picture_grid
from ldmseg_fast.metrics.pq import PQStat
from ldmseg_fast.optimizer import Optimizer, make_optimizer
from ldmseg_fast.resume import TrainingCheckpoints
from ldmseg_fast.stages import STAGES, Stage

OBJECT = [{"id": 1, "name": "object", "isthing": 1}]


class Interrupt:
    """SIGTERM and SIGINT ask for a stop after the step in flight; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant, cosine, or a tenth for the last tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    if config.schedule == "cosine":  # Loshchilov & Hutter 2017, equation 5
        share = config.min_lr + (1.0 - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "step":
        share = 0.1 if progress >= 0.9 else 1.0
    else:
        share = 1.0
    return config.learning_rate * share


class RunLog:
    """Scalars to `log.jsonl` and TensorBoard, on rank 0. On a resume, lines after the checkpoint's step are dropped."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.path = folder / "log.jsonl"
        self.writer: Any = None
        if not distributed.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if start_step and self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start_step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not distributed.is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | {key: round(value, 6) for key, value in values.items()}) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def make_dataset(config: Config, split: str, num_slots: int, train: bool) -> CocoPanoptic:
    data = config.data
    return CocoPanoptic(
        data.root,
        split,
        data.image_size,
        train=train,
        num_slots=num_slots,
        id_assignment=data.id_assignment,
        min_area=data.min_area,
        augmentation=Augmentation(data.flip, data.scale_min, data.color_jitter),
        seed=config.train.seed,
        cache=data.cache,
        limit=data.limit if train else data.val_limit,
    )


def training_batches(dataset: CocoPanoptic, config: Config, start_step: int) -> Iterator[dict[str, Any]]:
    """Micro-batches of this rank from `start_step` on, endless; the global batches do not depend on the ranks."""
    micro_batch = config.train.batch_size // config.train.accumulation
    world = distributed.world_size()
    if micro_batch % world:
        raise ConfigError(f"train.batch_size / train.accumulation = {micro_batch} must be a multiple of {world} ranks")
    sampler = EpochSampler(
        len(dataset),
        micro_batch // world,
        distributed.rank(),
        world,
        config.train.seed,
        start_step * config.train.accumulation,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.data.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.data.num_workers > 0,
    )
    return iter(loader)


@torch.no_grad()
def validate(stage: Stage, dataset: CocoPanoptic, device: torch.device, pictures: Path | None) -> dict[str, float]:
    """Class-agnostic PQ in percent over the split, shared among the ranks; a grid of pictures from rank 0."""
    stage.eval()
    stat = PQStat(OBJECT, class_agnostic=True)
    rows: list[list[Any]] = []
    size = max(1, min(32, stage.config.train.batch_size // distributed.world_size()))
    mine = range(distributed.rank(), len(dataset), distributed.world_size())
    for start in range(0, len(mine), size):
        indices = mine[start : start + size]
        batch = to_device(collate([dataset[index] for index in indices]), device)
        truths = [dataset.ground_truth(index) for index in indices]
        results = stage.predict(batch, [truth[0].shape for truth in truths])
        for index, (ids, segments), result in zip(indices, truths, results):
            stat.add(ids, segments, result.segmentation, result.segments_info, image_id=index)
            if distributed.is_main() and len(rows) < 8:
                image = dataset.load_image(index)
                picture, truth, guess = (enlarge(array, 256) for array in (image, ids, result.segmentation))
                rows.append([picture, overlay(picture, truth), overlay(picture, guess)])
    parts = distributed.gather_objects(stat)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    result = merged.result()
    if distributed.is_main() and pictures is not None and rows:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(rows, ["image", "truth", "prediction"]).save(pictures)
    stage.train()
    values = result["All"]
    return {f"val/{key}": 100.0 * values[key] for key in ("pq", "sq", "rq")}


def train(stage_name: str, config: Config, resume: bool = False) -> Path:
    """Train one stage.

    Args:
        stage_name: "autoencoder" or "diffusion".
        config: everything; `output_dir` becomes the MODEL_DIR.
        resume: continue from the newest checkpoint in `output_dir`.

    Returns:
        The model folder.

    Raises:
        ConfigError: settings that cannot work here.
        CheckpointError: nothing to resume, a checkpoint of another architecture, or finished weights in the way.
    """
    folder, settings, device = Path(config.output_dir), config.train, distributed.device()
    checkpoints = TrainingCheckpoints(folder / "checkpoints", settings.keep)
    checkpoints.check_start(resume)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 1) // local_ranks))
    torch.manual_seed(settings.seed)

    stage = STAGES[stage_name](config).to(device)
    if settings.channels_last and not distributed.launched():  # DeepSpeed's flat buffers hold contiguous weights
        stage = stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    num_slots = stage.mask_vae.config.num_slots
    dataset = make_dataset(config, config.data.train_split, num_slots, train=True)
    val_dataset = make_dataset(config, config.data.val_split, num_slots, train=False)
    optimizer = make_optimizer(stage, config)
    start_step = checkpoints.load(stage, optimizer) if resume else 0
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"stage": stage_name} | to_dict(config))
        (folder / "settings.txt").write_text("\n".join(describe(config)) + "\n", encoding="utf-8")

    log = RunLog(folder / "logs", start_step)
    batches = training_batches(dataset, config, start_step)
    started, cpu_started, best = time.monotonic(), time.process_time(), -1.0
    bar = tqdm(total=settings.steps, initial=start_step, desc=stage_name, unit="step", disable=_quiet())
    with Interrupt() as interrupt:
        step, stop = start_step, start_step >= settings.steps
        window_start, window_step = time.monotonic(), start_step
        while not stop:
            optimizer.set_learning_rate(learning_rate(step, settings))
            losses = _step(stage, optimizer, batches, config, step, device)
            step += 1
            bar.update()
            out_of_time = settings.max_minutes > 0 and time.monotonic() - started > 60 * settings.max_minutes
            last = step == settings.steps
            if step % settings.log_every == 0 or last:
                seconds = time.monotonic() - window_start
                values = {key: float(value) for key, value in losses.items()}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"loss is {values['loss']} at step {step}; resume with a lower train.learning_rate or precision=fp32"
                    )
                values["lr"] = learning_rate(step - 1, settings)
                values["images_per_s"] = (step - window_step) * settings.batch_size / max(seconds, 1e-9)
                values["cpu_seconds"] = time.process_time() - cpu_started
                bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_s']:.0f}")
                log.write(step, values)
                window_start, window_step = time.monotonic(), step
            # ranks agree on a stop every few steps only: it costs them a collective
            if step % min(settings.log_every, 10) == 0 or distributed.world_size() == 1:
                stop = distributed.any_rank(interrupt.requested or out_of_time)
            stop = stop or last
            if step % settings.validate_every == 0 or last:
                with optimizer.averaged_weights(stage):
                    metrics = validate(stage, val_dataset, device, folder / "pictures" / f"step-{step:08d}.png")
                log.write(step, metrics)
                best = max(best, metrics["val/pq"])
                bar.write(f"step {step}: " + "  ".join(f"{key} {value:.2f}" for key, value in metrics.items())) if (
                    not bar.disable
                ) else None
                window_start, window_step = time.monotonic(), step
            if step % settings.save_every == 0 or stop:
                checkpoints.save(stage, optimizer, step)
                with optimizer.averaged_weights(stage), optimizer.full_weights(stage):
                    if distributed.is_main():
                        stage.save(folder)
                distributed.barrier()
    bar.close()
    log.close()
    return folder


def _quiet() -> bool | None:
    """tqdm's `disable`: silent on other ranks and without a terminal."""
    return None if distributed.is_main() else True


def _step(
    stage: Stage,
    optimizer: Optimizer,
    batches: Iterator[dict[str, Any]],
    config: Config,
    step: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """One optimiser step over `accumulation` micro-batches; the losses averaged over them, this rank's."""
    totals: dict[str, torch.Tensor] = {}
    count = config.train.accumulation
    for micro_step in range(count):
        batch = to_device(next(batches), device)
        losses = optimizer.forward(batch, step * count + micro_step)
        optimizer.backward(losses["loss"])
        for key, value in losses.items():
            totals[key] = totals.get(key, 0.0) + value.detach() / count
    optimizer.step(stage)
    return totals
