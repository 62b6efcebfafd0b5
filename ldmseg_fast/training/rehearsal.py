"""Asks before a run whether it could begin: its data, its output folder, and what is in the way there."""

from __future__ import annotations

from pathlib import Path

from ldmseg_fast import distributed
from ldmseg_fast.config import Config
from ldmseg_fast.outputs import check_writable
from ldmseg_fast.training.cache_memory import fit_caches
from ldmseg_fast.training.checkpoints import TrainingCheckpoints
from ldmseg_fast.training.disk import disk_need, require_space
from ldmseg_fast.training.estimate import count_parameters, with_start
from ldmseg_fast.training.inputs import check_batch, check_output_dir, sets_of, training_set, validation_sets


def rehearse(stage_name: str, config: Config, resume: bool = False, trust: bool = False) -> list[str]:
    """Checks `data.root` and `output_dir` as the start of a run does, where they are given, and writes nothing.

    Args:
        stage_name, config, resume, trust: as of `loop.train`.

    Returns:
        What was found, as lines.

    Raises:
        ConfigError, CheckpointError, ArgumentError, DataError, InUseError: as `loop.train`.
        OSError: an output folder that cannot be written.
    """
    lines = []
    if config.output_dir:
        folder = Path(config.output_dir)
        check_output_dir(config)
        with distributed.only_writer_on_main(folder, "a training", "stop it, or take another output_dir", make=False):
            check_writable(folder)
        TrainingCheckpoints(folder / "checkpoints", config.train.keep, config.train.keep_best).check_start(
            resume, trust, recover=False
        )
    config = with_start(stage_name, config)
    if config.data.root:
        slots = config.mask_vae.num_slots
        train_set, val_sets = training_set(config, slots), validation_sets(config, slots)
        found = {"trains on": train_set} | {f"validates on {name}:": dataset for name, dataset in val_sets.items()}
        check_batch(config)
        lines += [f"{what} {len(dataset)} images" for what, dataset in found.items()]
        if not config.data.latent_cache:  # which takes the pictures' place
            categories = config.mask_vae.num_categories
            cached = fit_caches(sets_of(train_set), val_sets.values(), config.data.num_workers, categories)
            lines += [cached] if cached else []
    if config.output_dir:
        counts = count_parameters(stage_name, config)
        if not resume:
            require_space(folder, disk_need(counts.trainable, counts.total, config.train))
        lines.append(f"output_dir={folder} can be written")
    return lines
