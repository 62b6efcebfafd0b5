"""The gradient noise scale that the log tells is the one that gradients have."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldmseg_fast.config import Config, TrainConfig
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.noise_scale import MICRO, WHOLE, NoiseMeter, NoiseScale

Settings = Callable[..., Config]


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_a_known_noise_scale_is_found(loss_scale: float) -> None:
    """Pictures whose gradients are G plus white noise: S is the noise's variance over all parameters."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 1, bias=False)
    signal, deviation = torch.full((64,), 0.25), 1.0  # |G|^2 = 4, S = 64
    meter = NoiseMeter(layer, TrainConfig(batch_size=8, accumulation=4), ranks=1)
    found = {}
    for _ in range(20):
        squares = []
        for _ in range(50):
            layer.zero_grad()
            for _ in range(4):
                pictures = signal + deviation * torch.randn(2, 64, generator=generator)
                (layer(pictures).mean() * loss_scale / 4).backward()
            squares.append(meter.of_step(layer.weight.grad.norm() / loss_scale, loss_scale))
        found = {key: float(torch.stack([each[key] for each in squares]).mean()) for key in (MICRO, WHOLE)}
        meter.of_window(found, 50)
    assert found == {"noise_scale": pytest.approx(16, rel=0.15)}


def test_expected_squares_give_the_scale_itself() -> None:
    scale = NoiseScale(4, 32)
    for _ in range(3):
        found = scale.update(2.0 + 96 / 4, 2.0 + 96 / 32, 10)
    assert found == pytest.approx(48)
    assert scale.update(float("inf"), 1.0, 10) == found and scale.update(1.0, float("nan"), 10) == found


def test_no_scale_is_told_before_there_is_a_signal() -> None:
    assert NoiseScale(1, 4).update(4.0, 0.5, 1) is None
    assert NoiseScale(1, 4).update(1.0, 1.0, 1) == 0.0


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_squares_are_those_of_the_micro_batches(stage: str, settings: Settings, autoencoder: Path) -> None:
    """Beside gradients that are looked at between the backward passes."""
    options = [f"model.mask_vae={autoencoder}", "train.accumulation=2", "train.noise_scale=true", "train.clip=0.01"]
    run = Run(stage, settings("run", *options), Interrupt())
    trained = [p for p in run.stage.parameters() if p.requires_grad]
    seen, backward = [torch.zeros(sum(p.numel() for p in trained))], run.optimizer.backward

    def watched(loss: torch.Tensor, last: bool) -> None:
        backward(loss, last)
        now = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained])
        seen.append(now.clone())

    run.optimizer.backward = watched  # type: ignore[method-assign]
    totals = run.take_step()
    parts = [2 * (after - before) for before, after in itertools.pairwise(seen)]
    assert len(parts) == 2
    assert float(totals[MICRO]) == pytest.approx(float(sum(part.square().sum() for part in parts)) / 2, rel=1e-4)
    assert float(totals[WHOLE]) == pytest.approx(float(seen[-1].square().sum()), rel=1e-4)
    run.close()


def test_it_is_in_the_log_and_changes_no_loss(settings: Settings) -> None:
    logs = []
    for asked in ("true", "false"):
        options = ["train.steps=6", "train.accumulation=2", f"train.noise_scale={asked}"]
        folder = train("autoencoder", settings(asked, *options))
        logs.append([json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()])
    with_it, without = ([record for record in log if "loss" in record] for log in logs)
    assert [record["loss"] for record in with_it] == [record["loss"] for record in without]
    assert any(record.get("noise_scale", -1) >= 0 for record in with_it)
    assert not any("noise_scale" in record for record in without)
    assert not {MICRO, WHOLE} & {key for record in with_it for key in record}


def test_one_micro_batch_has_nothing_to_compare(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"train\.noise_scale=true .* a step has one; set train\.accumulation=2"):
        Run("autoencoder", settings("run", "train.noise_scale=true"), Interrupt())
