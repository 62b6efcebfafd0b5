"""Saves and loads training checkpoints: OUTPUT_DIR/checkpoints/step-00000500/, each complete or not there at all.

A folder is written under a temporary name, flushed to disk, listed with sizes and SHA-256 sums in manifest.json, and
then renamed. It holds safetensors and JSON only: reading it runs no code.

    manifest.json  state.json  shard-00000-of-00002.safetensors ...  fixed.safetensors  random-00000.safetensors ...
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.schema import read_settings
from ldmseg_fast.checkpoints.tensors import check_state, load_weights, save_weights
from ldmseg_fast.config.values import shown
from ldmseg_fast.distributed.ending import is_lost_connection
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import damage_of, sync_folder, why_not_written, write_files, write_json
from ldmseg_fast.locks import LOCK
from ldmseg_fast.temporary import clear_leftovers
from ldmseg_fast.training.exported import check_free
from ldmseg_fast.training.optimizer import Optimizer
from ldmseg_fast.training.shards import ShardReader, check_random_state, random_state, save_shards, set_random_state
from ldmseg_fast.training.stages import Stage

FORMAT_VERSION = 1
MANIFEST, STATE, FIXED = "manifest.json", "state.json", "fixed.safetensors"
WORTH_SHARING = 2**20  # bytes of frozen weights from which on checkpoints share one file
CURE = "free some space, or lower train.keep"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass
class Progress:
    """Says where a run is.

    Attributes:
        stage: its name.
        step: steps taken.
        items: training items seen by all ranks, which is the sampler's place.
        best: PQ of validations, by the step of their checkpoint.
        skipped: steps whose loss or gradients were not finite.
        validation_due: whether the validation of this step was interrupted.
    """

    stage: str
    step: int = 0
    items: int = 0
    best: dict[int, float] = field(default_factory=dict)  # PQ of validations, by the step of their checkpoint
    skipped: int = 0
    seconds: float = 0.0  # wall time in training, all starts together
    validation_due: bool = False  # that of this step was interrupted

    def best_step(self) -> int | None:
        """Returns the step of the first validation with the highest PQ; None before any."""
        return max(self.best, key=lambda step: (self.best[step], -step), default=None)


class TrainingCheckpoints:
    """Keeps the checkpoints of one run: the newest `keep`, and those of the best `keep_best` validations.

    Attributes:
        foreign: folder of a checkpoint of DeepSpeed's own that `check_start` found and was told to trust.
    """

    def __init__(self, folder: Path, keep: int, keep_best: int = 0) -> None:
        self.folder, self.keep, self.keep_best = folder, keep, keep_best
        self.foreign: Path | None = None
        self._fixed = ("", folder)  # digest of the newest checkpoint's fixed tensors, and their file

    def steps(self) -> list[int]:
        """Lists the steps of complete checkpoints, ascending.

        A manifest is what makes one complete; `latest` is not asked.
        """
        found = []
        for path in self.folder.glob("step-*"):
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match and (path / MANIFEST).is_file():
                found.append(int(match[1]))
        return sorted(found)

    def path(self, step: int) -> Path:
        """Names the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def check_start(self, resume: bool, trust: bool = False, recover: bool = True) -> None:
        """Checks on rank 0 that a run may start here; all ranks call it.

        With `trust`, a checkpoint that DeepSpeed itself wrote there will do; `foreign` is its folder then. With
        `recover`, what a killed run left is cleared first.

        Raises:
            CheckpointError: there is nothing to resume, or a fresh start would hide an older run or replace a model.
        """
        error = None
        if distributed.is_main():
            try:
                if recover:
                    self._recover()
                self._check_start(resume, trust)
            except CheckpointError as failure:
                error = failure
        error, self.foreign = distributed.broadcast_object((error, self.foreign))
        if error is not None:
            raise error

    def _check_start(self, resume: bool, trust: bool) -> None:
        steps, run = self.steps(), self.folder.parent
        self.foreign = None
        if not resume and steps:
            raise CheckpointError(
                f"{run} holds a run at step {steps[-1]}; continue it with --resume or take another output_dir"
            )
        if not resume:
            check_free(run)
        if not resume or steps:
            return
        pickles = sorted(path for path in run.rglob("*") if path.suffix in PICKLES) if run.is_dir() else []
        if pickles and trust and pickles[0].name.endswith("_states.pt"):
            self.foreign = pickles[0].parent
            return
        if pickles:
            raise CheckpointError(
                f"--resume: {pickles[0]} is a pickle, which can run any code when it is read. If it is a checkpoint of "
                f"DeepSpeed's that you wrote yourself, add --trust; `ldmseg convert` reads published weights safely"
            )
        what = (
            "is empty"
            if run.is_dir() and {path.name for path in run.iterdir()} <= {LOCK}
            else "holds no complete checkpoint"
        )
        what = what if run.is_dir() else "does not exist"
        raise CheckpointError(
            f"--resume: {run} {what}; give the output_dir of an interrupted run, or leave out --resume"
        )

    def save(self, stage: Stage, optimizer: Optimizer, progress: Progress) -> None:
        """Writes the checkpoint of `progress.step` and drops what need not stay; all ranks call it.

        Raises:
            CheckpointError: on every rank where one of them cannot write; older checkpoints stay as they are.
        """
        rank, world = distributed.rank(), distributed.world_size()
        temporary, digest = self.folder / f".new-{progress.step:08d}", ""
        self._prepare(temporary, progress.step)
        with optimizer.whole_parameters(frozen_only=True):
            fixed = _fixed_state(stage) if distributed.is_main() else {}
            shapes = {name: list(_full_shape(p)) for name, p in stage.named_parameters()}
            written: dict[str, Callable[[Path], None]] = {
                f"shard-{rank:05d}-of-{world:05d}.safetensors": lambda path: save_shards(path, optimizer.own_shards()),
                f"random-{rank:05d}.safetensors": lambda path: save_weights(random_state(), path),
            }
            if distributed.is_main():
                state = {
                    "format_version": FORMAT_VERSION,
                    "world_size": world,
                    "zero_stage": optimizer.config.zero_stage,
                    "optimizer": optimizer.config.optimizer,
                    "progress": vars(progress) | {"best": {str(k): v for k, v in progress.best.items()}},
                    "counters": optimizer.counters(),
                    "shapes": shapes,
                }
                digest = _digest(fixed)
                written[FIXED] = lambda path: self._save_fixed(fixed, digest, path)
                written[STATE] = lambda path: write_json(path, state)
            result = write_files(temporary, written, CURE)
        files: dict[str, Any] = {}
        errors = []
        for part in distributed.gather_objects(result):
            if isinstance(part, str):
                errors.append(part)
            else:
                files |= part
        if not errors and distributed.is_main():
            try:
                self._publish(temporary, progress, files)
            except OSError as error:
                errors.append(why_not_written(error, temporary, CURE))
        self._agree(errors[0] if errors else "", temporary, progress.step)
        if distributed.is_main():
            self._fixed = (digest, self.path(progress.step) / FIXED)

    def _save_fixed(self, fixed: dict[str, Tensor], digest: str, path: Path) -> None:
        """Writes what is not trained, or gives the file of the checkpoint before one more name where it is the same."""
        before, old = self._fixed
        if before == digest and sum(tensor.nbytes for tensor in fixed.values()) > WORTH_SHARING:
            with contextlib.suppress(OSError):  # gone, or a file system that has no links
                path.hardlink_to(old)
                return
        save_weights(fixed, path)

    def _prepare(self, temporary: Path, step: int) -> None:
        error = ""
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
            except OSError as failure:
                error = why_not_written(failure, temporary, CURE)
        self._agree(error, temporary, step)

    def _agree(self, error: str, temporary: Path, step: int) -> None:
        """Raise rank 0's error on every rank."""
        error = distributed.broadcast_object(error)
        if not error:
            return
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        left = f"the newest complete one is of step {self.steps()[-1]}" if self.steps() else "there is none yet"
        raise CheckpointError(f"checkpoint of step {step} not saved: {error}; {left}")

    def _publish(self, temporary: Path, progress: Progress, files: dict[str, Any]) -> None:
        write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        sync_folder(temporary)
        final = self.path(progress.step)
        old = final.with_name(f".old-{final.name}")
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        write_json(self.folder / "latest", final.name)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        steps = self.steps()
        best = sorted((step for step in progress.best if step in steps), key=lambda step: -progress.best[step])
        for step in set(steps[: -self.keep]) - set(best[: self.keep_best]):
            shutil.rmtree(self.path(step), ignore_errors=True)

    def _recover(self) -> None:
        """Clears what a killed run left.

        A kill between the two renames of `_publish` left the older checkpoint of a step under another name.
        """
        for old in self.folder.glob(".old-*"):
            with contextlib.suppress(OSError):  # there is a newer one
                old.rename(old.with_name(old.name.removeprefix(".old-")))
        for leftover in (*self.folder.glob(".new-*"), *self.folder.glob(".old-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.folder.is_dir():
            clear_leftovers(self.folder)

    def load(self, stage: Stage, optimizer: Optimizer, stage_name: str, say: Callable[[str], None]) -> Progress:
        """Loads the newest checkpoint that is whole; all ranks call it, as many as like.

        A damaged one is named through `say` and the one before it taken. Where `check_start` found a trusted checkpoint
        of DeepSpeed's own instead, that is loaded.

        Raises:
            CheckpointError: all are damaged, or of another architecture, stage or version.
        """
        if self.foreign is not None:
            step = _load_foreign(optimizer, self.foreign)
            batch_size = optimizer.config.batch_size
            say(f"loaded DeepSpeed's checkpoint {self.foreign}: step {step}; averages start anew")
            return Progress(stage_name, step, step * batch_size)
        if distributed.is_main():
            self._recover()
        distributed.barrier()
        damage = ""
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if not damage:
                return self._load(self.path(step), stage, optimizer, stage_name)
            say(f"warning: {damage}; going back to the checkpoint before it")
        raise CheckpointError(f"--resume: no checkpoint in {self.folder} is whole; the last one tried: {damage}")

    def damage(self, step: int) -> str:
        """Tells what is wrong with a checkpoint's files by its manifest, "" if nothing; the ranks share the reading."""
        folder = self.path(step)
        problem = ""
        try:
            files = read_settings(folder / MANIFEST)["files"]
            for name in sorted(files)[distributed.rank() :: distributed.world_size()]:
                problem = problem or damage_of(folder / name, files[name])
        except (CheckpointError, KeyError, TypeError, ValueError, OSError) as error:
            problem = f"{folder / MANIFEST}: damaged ({error})"
        return next((found for found in distributed.gather_objects(problem) if found), "")

    def _load(self, folder: Path, stage: Stage, optimizer: Optimizer, stage_name: str) -> Progress:
        state = read_settings(folder / STATE)
        if state.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{folder}: checkpoint format {state.get('format_version')!r}, this version reads 1")
        with _damage_named(folder / STATE):
            values = state["progress"] | {"best": {int(k): float(v) for k, v in state["progress"]["best"].items()}}
            progress = Progress(**values)
            shapes = {name: tuple(int(size) for size in shape) for name, shape in state["shapes"].items()}
            saved = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            counters, world_size = _counters_of(state), int(state["world_size"])
            if not isinstance(progress.step, int) or not isinstance(progress.items, int) or progress.step < 0:
                raise ValueError(f"step {progress.step!r}")
        if progress.stage != stage_name:
            raise CheckpointError(f"{folder}: a run of the {progress.stage} stage, not of the {stage_name}")
        was, now = state.get("optimizer"), optimizer.config.optimizer  # older ones do not tell
        if was is not None and was != now:
            raise CheckpointError(
                f"{folder}: its moments are of train.optimizer={was} and mean nothing to {now}; go on with {was}, or "
                f"start another run from the model folder"
            )
        own = {name: torch.empty(_full_shape(p), device="meta") for name, p in stage.named_parameters()}
        check_state(own, saved, str(folder))
        reader = ShardReader(folder)
        reader.load(optimizer.shards, optimizer.averages)
        optimizer.set_counters(counters)
        fixed = load_weights(folder / FIXED)
        with optimizer.whole_parameters(frozen_only=True, write=True), torch.no_grad():
            for name, tensor in _fixed_state(stage).items():
                if name in fixed and tensor.shape == fixed[name].shape:
                    tensor.copy_(fixed[name])
                elif name in fixed and distributed.is_main():
                    raise CheckpointError(f"{folder}: {name} has another shape there; other settings?")
            own_fixed = _fixed_state(stage)
            if {key: value.dtype for key, value in own_fixed.items()} == {
                key: value.dtype for key, value in fixed.items()
            }:
                self._fixed = (_digest(own_fixed), folder / FIXED)
        optimizer.refresh()
        random_file = folder / f"random-{distributed.rank():05d}.safetensors"
        if world_size == distributed.world_size() and random_file.is_file():
            random_tensors = load_weights(random_file)
            with _damage_named(random_file):
                check_random_state(random_tensors)
            set_random_state(random_tensors)
        return progress


def _counters_of(state: dict[str, Any]) -> dict[str, float]:
    """Reads what `Optimizer.set_counters` takes; raises where it is not whole."""
    counters = {key: state["counters"][key] for key in ("steps", "adam_steps", "loss_scale", "quiet_steps")}
    for key, value in counters.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
            raise ValueError(f"{key} {shown(value)}")
    return counters


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what values of the wrong kind in a file raise inside the block into an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({shown(error)}); remove its folder to go on from an older one"
        ) from None


def _load_foreign(optimizer: Optimizer, folder: Path) -> int:
    """Loads a trusted checkpoint of DeepSpeed's own, and names it where it is damaged; returns its step."""
    try:
        return optimizer.load_foreign(folder)
    except (EOFError, pickle.UnpicklingError, KeyError, RuntimeError) as error:
        if isinstance(error, CheckpointError) or is_lost_connection(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: DeepSpeed does not load it ({reason}): damaged, or of other settings; take an older one"
        ) from None


def _digest(state: dict[str, Tensor]) -> str:
    """Hashes names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _full_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 leaves an empty tensor in its place


def _fixed_state(stage: Stage) -> dict[str, Tensor]:
    """What is not trained: frozen parameters and buffers."""
    frozen = {name: p.detach() for name, p in stage.named_parameters() if not p.requires_grad}
    saved = stage.state_dict(keep_vars=True)
    return frozen | {name: buffer for name, buffer in stage.named_buffers() if name in saved}
