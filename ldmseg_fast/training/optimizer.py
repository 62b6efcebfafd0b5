"""Takes the step: torch's AdamW or Muon on one process, DeepSpeed ZeRO where a launcher started several."""

from __future__ import annotations

import abc
import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast import distributed
from ldmseg_fast.config import Config, TrainConfig
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.training.adamw_8bit import EightBitAdamW
from ldmseg_fast.training.deepspeed_settings import BUCKET, deepspeed_config, merge_user_config
from ldmseg_fast.training.muon import Muon, hidden_matrices
from ldmseg_fast.training.shards import Averages, Shard, flat_shards, parameter_shards, whole_shards
from ldmseg_fast.training.stages import Stage


class LossScale:
    """Keeps float16 gradients in range (Micikevicius et al. 2018).

    The scale is halved by an overflow, and doubled after `patience` steps without one.
    """

    def __init__(self, enabled: bool, start: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.value, self.quiet_steps = (start if enabled else 1.0), 0

    def update(self, overflow: bool) -> None:
        """Takes note of whether a step overflowed."""
        if not self.enabled:
            return
        self.quiet_steps = 0 if overflow else self.quiet_steps + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.quiet_steps % self.patience == 0:
            self.value = min(self.value * 2, 2.0**24)


class Optimizer(abc.ABC):
    """Runs forward, backward and step of a stage, and holds this rank's state: weights, moments, averages."""

    shards: list[Shard]

    def __init__(self, stage: Stage, config: Config) -> None:
        self.stage, self.config = stage, config.train
        self.scale = LossScale(config.train.precision == "fp16")
        self.steps = 0  # updates so far, for the averages
        self.grad_norm: Tensor | float = 0.0  # of the last step, before clipping

    def _start(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.averages = Averages(shards, self.config.ema) if self.config.ema else None

    @abc.abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Computes the losses of a micro-batch (see `Stage`): float scalars by name."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a micro-batch's loss, a float32 scalar; `last` of its step."""

    @abc.abstractmethod
    def _update(self) -> Tensor | bool:
        """Change the weights; whether gradients were not finite, so that nothing changed."""

    @abc.abstractmethod
    def _adamw(self) -> torch.optim.AdamW: ...

    @abc.abstractmethod
    def refresh(self) -> None:
        """Makes the weights that the forward pass uses follow the shards' after these were written to."""

    def step(self) -> Tensor | bool:
        """Updates weights and averages once.

        Returns:
            Whether gradients were not finite, so that nothing changed: a boolean, or a boolean scalar on the device.
        """
        skipped = self._update()
        if not isinstance(skipped, bool) or not skipped:
            self.steps += 1
            if self.averages is not None:
                self.averages.update(self.steps)
        return skipped

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate, times each group's own factor."""
        for group in self._adamw().param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)

    def counters(self) -> dict[str, float]:
        """Gives what a checkpoint holds beside the shards; `set_counters` takes it."""
        adam_steps = next((int(state["step"]) for state in self._adamw().state.values()), 0)
        scale = {"loss_scale": self.scale.value, "quiet_steps": self.scale.quiet_steps}
        return {"steps": self.steps, "adam_steps": adam_steps} | scale

    def set_counters(self, counters: dict[str, float]) -> None:
        """Goes on from what `counters` gave."""
        self.steps = int(counters["steps"])
        for state in self._adamw().state.values():
            state["step"].fill_(float(counters["adam_steps"]))
        if self.scale.enabled:
            self.scale.value, self.scale.quiet_steps = counters["loss_scale"], int(counters["quiet_steps"])

    def own_shards(self) -> list[tuple[Shard, Tensor | None]]:
        """Lists what this rank writes into a checkpoint, each shard with its average, float32 of the shard's any shape.

        Together the ranks write each piece once.
        """
        averages: list[Any] = [None] * len(self.shards) if self.averages is None else self.averages.values
        return list(zip(self.shards, averages))

    def load_foreign(self, folder: Path) -> int:
        """Loads a checkpoint that DeepSpeed itself wrote, by unpickling it; returns its step.

        Raises:
            CheckpointError: it cannot be loaded here.
        """
        raise CheckpointError(
            f"{folder}: written by DeepSpeed, so start training with deepspeed or torchrun to load it"
        )

    @contextlib.contextmanager
    def whole_parameters(self, frozen_only: bool = False, write: bool = False) -> Iterator[None]:
        """Lets every rank see whole parameters inside; with `write`, what rank 0 puts into them stays."""
        yield

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Lets the stage hold its moving averages inside."""
        if self.averages is None:
            yield
            return
        self.averages.swap()
        self.refresh()
        try:
            yield
        finally:
            self.averages.swap()
            self.refresh()


def make_optimizer(stage: Stage, config: Config, user_config: dict[str, Any] | None = None) -> Optimizer:
    """Makes the optimizer of this process: DeepSpeed's where a launcher started it.

    Args:
        stage: what is trained.
        config: the run's.
        user_config: a DeepSpeed configuration of the user's, merged with ours.

    Raises:
        ConfigError: it contradicts our settings.
    """
    if distributed.launched():
        return DeepSpeedOptimizer(stage, config, user_config or {})
    return PlainOptimizer(stage, config)


def make_adamw(stage: Stage, config: Config, fused: bool) -> torch.optim.AdamW:
    """Makes what steps whole parameters, `train.optimizer`; `fused` where gradients may be divided on the device.

    Raises:
        ConfigError: an optimizer that takes parameters whole under a ZeRO stage that cuts them, or Muon with no matrix.
    """
    settings = config.train
    groups = stage.parameter_groups()
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused)
    check_whole(settings)
    if settings.optimizer == "adamw_8bit":
        return EightBitAdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused)
    hidden = {id(parameter) for parameter in hidden_matrices(stage)}
    if not hidden:
        raise ConfigError("train.optimizer=muon: no trained matrix of a UNet here; choose train.optimizer=adamw")
    split = []
    for group in groups:
        for orthogonal in (False, True):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in hidden) == orthogonal]
            split += [group | {"params": chosen, "orthogonal": orthogonal}] if chosen else []
    return Muon(split, lr=settings.learning_rate, betas=settings.betas, fused=fused)


def check_whole(settings: TrainConfig) -> None:
    """Checks that parameters stay whole where the optimizer takes them so.

    Raises:
        ConfigError: a ZeRO stage that cuts them, under a launcher.
    """
    if settings.optimizer != "adamw" and settings.zero_stage and distributed.launched():
        raise ConfigError(
            f"train.optimizer={settings.optimizer}: train.zero_stage={settings.zero_stage} cuts the matrices that it "
            "takes whole; choose train.zero_stage=0 or train.optimizer=adamw"
        )


def _norm_and_scale(gradients: list[Tensor], clip: float, loss_scale: float) -> tuple[Tensor, Tensor]:
    """Norm of the unscaled gradients, and what to divide the scaled ones by: the loss scale, times the clipping."""
    norm = nn.utils.get_total_norm(gradients) / loss_scale
    excess = torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else torch.ones_like(norm)
    return norm, excess * loss_scale


class PlainOptimizer(Optimizer):
    """Trains on one process: AdamW or Muon, clipping, loss scaling; nothing in it waits for the device."""

    def __init__(self, stage: Stage, config: Config) -> None:
        super().__init__(stage, config)
        self.adamw: Any = make_adamw(stage, config, fused=True)
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self._start(whole_shards(stage, self.adamw))

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """See `Optimizer.forward`."""
        return self.stage(batch, step)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Optimizer.backward`."""
        (loss * (self.scale.value / self.config.accumulation)).backward()

    def _update(self) -> Tensor | bool:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm, divisor = _norm_and_scale(gradients, self.config.clip, self.scale.value)
        skipped, self.grad_norm = ~torch.isfinite(norm), norm
        # the fused kernel divides, and leaves everything as it is where found_inf is 1, without asking the CPU
        self.adamw.grad_scale, self.adamw.found_inf = divisor, skipped.float()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return skipped

    def _adamw(self) -> torch.optim.AdamW:
        return self.adamw

    def refresh(self) -> None:
        """See `Optimizer.refresh`."""
        pass  # the shards are the parameters


class DeepSpeedOptimizer(Optimizer):
    """Trains on several ranks: DeepSpeed ZeRO 0-3 (Rajbhandari et al. 2020) around AdamW, and ZeRO 0 around Muon."""

    def __init__(self, stage: Stage, config: Config, user_config: dict[str, Any]) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                f"training on several ranks needs DeepSpeed ({error}): pip install 'ldmseg_fast[train]', or one rank"
            ) from None

        super().__init__(stage, config)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # dozens of lines per rank otherwise
        warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
        with contextlib.suppress(ImportError, AttributeError):
            from deepspeed.ops import __compatible_ops__

            __compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes two minutes and serves CPU ranks only
        train, on_gpu = config.train, torch.cuda.is_available()
        count = sum(p.numel() for p in stage.parameters() if p.requires_grad)
        settings = deepspeed_config(config, distributed.world_size(), count, on_gpu)
        settings = merge_user_config(settings, user_config, train.clip)
        adamw = make_adamw(stage, config, fused=not train.offload)
        self.engine, *_ = deepspeed.initialize(model=stage, optimizer=adamw, config=settings)
        self.zero: Any = self.engine.optimizer
        self.zero_stage = train.zero_stage
        if self.zero_stage == 0:
            self.parameters = [p for p in stage.parameters() if p.requires_grad]
            # DeepSpeed would flatten the gradients of 500 million parameters at a time: as much memory again
            self.engine.allreduce_gradients = partial(self.engine.allreduce_gradients, bucket_size=BUCKET)
            if train.channels_last:  # ZeRO's flat buffers hold contiguous weights only
                stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._start(self._cut(stage))

    def _cut(self, stage: Stage) -> list[Shard]:
        if self.zero_stage == 0:
            return whole_shards(stage, self._adamw())
        if self.zero_stage < 3:
            return flat_shards(stage, self.zero)
        return parameter_shards(stage, self.zero, distributed.rank())

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """See `Optimizer.forward`."""
        return self.engine(batch, step)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Optimizer.backward`."""
        if self.zero_stage == 0:
            loss = loss * self.scale.value
        elif self.scale.enabled:
            self.zero.override_loss_scale(self.scale.value)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts micro-batches only

    def _update(self) -> Tensor | bool:
        if self.zero_stage:
            self.engine.step()
            skipped = bool(self.zero.overflow)
            self.grad_norm = self.engine.get_global_grad_norm() or 0.0
            if skipped and self.zero_stage == 3:
                self._gather_persistent()  # a step that DeepSpeed skips leaves them cut
            return skipped
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm, divisor = _norm_and_scale(gradients, self.config.clip, self.scale.value)
        self.grad_norm = norm
        skipped = not bool(torch.isfinite(norm))  # the same on all ranks, which hold the same gradients
        if skipped:
            self.engine.zero_grad()
        else:
            torch._foreach_div_(gradients, divisor)
        self.engine.step()
        return skipped

    def _adamw(self) -> torch.optim.AdamW:
        return self.zero.optimizer if self.zero_stage else self.zero

    def own_shards(self) -> list[tuple[Shard, Tensor | None]]:
        """See `Optimizer.own_shards`."""
        own = super().own_shards()
        return own if self.zero_stage else own[distributed.rank() :: distributed.world_size()]

    def load_foreign(self, folder: Path) -> int:
        """See `Optimizer.load_foreign`."""
        if self.config.optimizer != "adamw":
            raise CheckpointError(
                f"{folder}: DeepSpeed's checkpoints have AdamW's moments; go on with train.optimizer=adamw"
            )
        path, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed finds no checkpoint in it")
        self.steps = self.engine.global_steps
        self._start(self._cut(self.stage))
        return self.steps

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Optimizer.refresh`."""
        if self.zero_stage in (1, 2):
            self.zero.update_lp_params()
        elif self.zero_stage == 3:
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Make the small parameters whole that ZeRO 3 does not cut between steps."""
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @contextlib.contextmanager
    def whole_parameters(self, frozen_only: bool = False, write: bool = False) -> Iterator[None]:
        """See `Optimizer.whole_parameters`."""
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        wanted = [p for p in self.stage.parameters() if not (frozen_only and p.requires_grad)]
        with deepspeed.zero.GatheredParameters(wanted, modifier_rank=0 if write else None):
            yield
