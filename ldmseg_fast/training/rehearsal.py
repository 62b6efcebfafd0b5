"""Asks before a run whether it could begin: its data, its output folder, and what is in the way there."""

from __future__ import annotations

from pathlib import Path

import torch

from ldmseg_fast import distributed
from ldmseg_fast.config import Config
from ldmseg_fast.data.latent_cache import attach_cache
from ldmseg_fast.outputs import check_writable
from ldmseg_fast.training.cache_memory import fit_caches
from ldmseg_fast.training.checkpoints import TrainingCheckpoints
from ldmseg_fast.training.compilation import check_backend
from ldmseg_fast.training.disk import disk_need, require_space
from ldmseg_fast.training.estimate import count_parameters, with_start
from ldmseg_fast.training.inputs import (
    check_batch,
    check_output_dir,
    hub_names,
    sets_of,
    training_set,
    use_categories,
    validation_sets,
)
from ldmseg_fast.training.noise_scale import NoiseMeter
from ldmseg_fast.training.optimizer import make_adamw
from ldmseg_fast.training.stages import STAGES, Stage
from ldmseg_fast.training.trackers import TRACKERS, library


def rehearse(stage_name: str, config: Config, resume: bool = False, trust: bool = False) -> list[str]:
    """Checks what a run starts from, its data and its output folder, as its start does, and writes nothing.

    What is not given is not asked for.

    Args:
        stage_name, config, resume, trust: as of `loop.train`.

    Returns:
        What was found, as lines.

    Raises:
        ConfigError, CheckpointError, ArgumentError, DataError, InUseError: as `loop.train`.
        OSError: an output folder that cannot be written.
    """
    lines: list[str] = []
    folder = Path(config.output_dir)
    if config.output_dir:
        check_output_dir(config)
        with distributed.only_writer_on_main(folder, "a training", "stop it, or take another output_dir", make=False):
            check_writable(folder)
        TrainingCheckpoints(folder / "checkpoints", config.train.keep, config.train.keep_best).check_start(
            resume, trust, recover=False
        )
    stage = _built(stage_name, config)
    config = with_start(stage_name, config) if stage is None else stage.config
    mask_vae = config.mask_vae if stage is None else stage.mask_vae.config
    if config.data.root:
        slots = mask_vae.num_slots
        train_set, val_sets = training_set(config, slots), validation_sets(config, slots)
        found = {"trains on": train_set} | {f"validates on {name}:": dataset for name, dataset in val_sets.items()}
        if stage is not None:
            use_categories(stage, sets_of(train_set), val_sets.values(), folder if resume else None)
            if stage_name != "autoencoder":
                attach_cache(sets_of(train_set)[0], config, stage.get_submodule("image_vae"), lines.append)
        check_batch(config)
        lines += [f"{what} {len(dataset)} images" for what, dataset in found.items()]
        if not config.data.latent_cache:  # which takes the pictures' place
            workers = config.data.num_workers
            cached = fit_caches(sets_of(train_set), val_sets.values(), workers, mask_vae.num_categories)
            lines += [cached] if cached else []
    if stage is not None:
        if config.train.compile != "none":
            check_backend(config.train.compile_backend)
        if config.train.optimizer == "muon":
            make_adamw(stage, config, fused=False)
        else:  # an optimizer of torch imports the compiler, a second that tells no more
            stage.parameter_groups()
        if config.train.noise_scale:
            NoiseMeter(stage, config.train, distributed.world_size())
    if config.output_dir:
        counts = count_parameters(stage_name, config)
        if not resume:
            require_space(folder, disk_need(counts.trainable, counts.total, config.train))
        lines.append(f"output_dir={folder} can be written")
    for tracker in TRACKERS:
        if project := getattr(config.train, tracker):
            library(tracker, project)
    return lines


def _built(stage_name: str, config: Config) -> Stage | None:
    """Builds a stage on the meta device, where the weights of a UNet are not read.

    None where an auto-encoder is missing, weights are still to be fetched, or CLIP would have to be loaded. Errors as
    the stage's.
    """
    if stage_name != "autoencoder":
        clip = config.unet.conditioning.startswith("clip") and Path(config.conditioning.path).is_dir()
        if clip or hub_names(config) or not with_start(stage_name, config).model.mask_vae:
            return None
    with torch.device("meta"):
        return STAGES[stage_name](config)
