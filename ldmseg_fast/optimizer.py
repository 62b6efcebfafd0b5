"""Who takes the step: torch's AdamW on one process, DeepSpeed ZeRO where a launcher started several."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast import distributed
from ldmseg_fast.checkpoint import CheckpointError, Ema, load_weights, save_weights
from ldmseg_fast.config import Config
from ldmseg_fast.stages import Stage


class Optimizer(abc.ABC):
    """Forward, backward and step of a stage, its averaged weights, and their state on disk."""

    ema: Ema | None

    @abc.abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]: ...

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abc.abstractmethod
    def step(self, stage: Stage) -> None: ...

    @abc.abstractmethod
    def set_learning_rate(self, rate: float) -> None: ...

    @abc.abstractmethod
    def save(self, folder: Path, stage: Stage) -> None: ...

    @abc.abstractmethod
    def load(self, folder: Path, stage: Stage) -> None: ...

    @contextlib.contextmanager
    def full_weights(self, stage: Stage) -> Iterator[None]:
        """Inside, every rank sees whole parameters."""
        yield

    @contextlib.contextmanager
    def averaged_weights(self, stage: Stage) -> Iterator[None]:
        """Inside, the stage holds its moving averages."""
        if self.ema is None:
            yield
            return
        self.ema.swap(stage)
        try:
            yield
        finally:
            self.ema.swap(stage)


def make_optimizer(stage: Stage, config: Config) -> Optimizer:
    return DeepSpeedOptimizer(stage, config) if distributed.launched() else PlainOptimizer(stage, config)


def _adamw(stage: Stage, config: Config) -> torch.optim.AdamW:
    settings = config.train
    return torch.optim.AdamW(
        stage.parameter_groups(), lr=settings.learning_rate, betas=settings.betas, fused=not settings.offload
    )


def _set_rate(groups: list[dict[str, Any]], rate: float) -> None:
    for group in groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


class PlainOptimizer(Optimizer):
    """One process: AdamW, clipping, gradient accumulation, fp16 loss scaling."""

    def __init__(self, stage: Stage, config: Config) -> None:
        self.config = config.train
        self.stage = stage
        self.adamw = _adamw(stage, config)
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(enabled=self.config.precision == "fp16")
        self.call: Any = torch.compile(stage) if self.config.compile else stage
        self.ema = Ema(stage, self.config.ema) if self.config.ema else None
        self.steps = 0

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return self.call(batch, step)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.config.accumulation).backward()

    def step(self, stage: Stage) -> None:
        self.scaler.unscale_(self.adamw)
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        if self.ema is not None:
            self.ema.update(stage, self.steps)

    def set_learning_rate(self, rate: float) -> None:
        _set_rate(self.adamw.param_groups, rate)

    def save(self, folder: Path, stage: Stage) -> None:
        save_weights(dict(stage.state_dict()), folder / "weights.safetensors")
        state = {"scale": torch.tensor(self.scaler.get_scale()), "steps": torch.tensor(self.steps)}
        for name, parameter in stage.named_parameters():
            for key, value in self.adamw.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = value
        save_weights(state, folder / "optimizer.safetensors")
        if self.ema is not None:
            save_weights(self.ema.shadow, folder / "ema.safetensors")

    def load(self, folder: Path, stage: Stage) -> None:
        _load_stage(stage, folder)
        state = load_weights(folder / "optimizer.safetensors")
        self.steps = int(state["steps"])
        for name, parameter in stage.named_parameters():
            moments = {key.split("/")[0]: value for key, value in state.items() if key.partition("/")[2] == name}
            if moments:
                step = moments.pop("step")
                self.adamw.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
                self.adamw.state[parameter]["step"] = step
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": float(state["scale"])})
        _load_ema(self.ema, folder)


def _load_stage(stage: Stage, folder: Path) -> None:
    from ldmseg_fast.checkpoint import load_state

    load_state(stage, load_weights(folder / "weights.safetensors"), str(folder))


def _load_ema(ema: Ema | None, folder: Path, name: str = "ema.safetensors") -> None:
    if ema is None:
        return
    shadow = load_weights(folder / name)
    if shadow.keys() != ema.shadow.keys():
        raise CheckpointError(f"{folder / name}: averages of other parameters; was train.ema off or the model changed?")
    for key, value in shadow.items():
        ema.shadow[key].copy_(value)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings, derived from ours. Autocast is the stage's own, so DeepSpeed sees float32 weights."""
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero_stage, "contiguous_gradients": True, "overlap_comm": False}
    if train.offload and train.zero_stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // train.accumulation // world_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedOptimizer(Optimizer):
    """Several ranks: DeepSpeed ZeRO 0-3 around the same AdamW."""

    def __init__(self, stage: Stage, config: Config) -> None:
        import deepspeed

        self.config = config.train
        with contextlib.suppress(ImportError, AttributeError):
            from deepspeed.ops import __compatible_ops__

            __compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes two minutes and serves CPU ranks only
        settings = deepspeed_config(config, distributed.world_size())
        self.engine, *_ = deepspeed.initialize(model=stage, optimizer=_adamw(stage, config), config=settings)
        if self.config.compile:
            self.engine.compile()
        self.ema = Ema(stage, self.config.ema) if self.config.ema else None
        self.steps = 0

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return self.engine(batch, step)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()  # counts micro-batches itself; weights change at the last one

    def step(self, stage: Stage) -> None:
        self.steps += 1
        if self.ema is not None:
            self.ema.update(stage, self.steps)

    def set_learning_rate(self, rate: float) -> None:
        _set_rate(self.engine.optimizer.param_groups, rate)

    @contextlib.contextmanager
    def full_weights(self, stage: Stage) -> Iterator[None]:
        if self.config.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(stage.parameters())):
            yield

    def save(self, folder: Path, stage: Stage) -> None:
        self.engine.save_checkpoint(str(folder), tag="deepspeed", client_state={"steps": self.steps}, save_latest=False)
        if self.ema is not None and (self.config.zero_stage == 3 or distributed.is_main()):
            save_weights(self.ema.shadow, folder / self._ema_name())

    def load(self, folder: Path, stage: Stage) -> None:
        path, client_state = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it")
        self.steps = int(client_state["steps"])
        _load_ema(self.ema, folder, self._ema_name())

    def _ema_name(self) -> str:
        return f"ema-{distributed.rank()}.safetensors" if self.config.zero_stage == 3 else "ema.safetensors"
