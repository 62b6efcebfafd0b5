"""What a trainer looks for is in the log, and validations stay within their share of the time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmseg_fast.config import Config, load_config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training import operations
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.operations import peak_operations, picture_operations

Settings = Callable[..., Config]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]


def test_the_log_has_what_a_trainer_looks_for(settings: Settings) -> None:
    records = log_of(train("autoencoder", settings("run", "train.steps=4", "train.clip=0.5", "train.validate_every=2")))
    steps = [record for record in records if "loss" in record]
    for record in steps:
        assert 0 < record["grad_norm"] < 1e6 and record["memory_gib"] > 0.1 and record["tflops"] > 0
    assert steps[-1]["left_seconds"] == 0 < steps[0]["left_seconds"]
    held_out = [record["val/loss"] for record in records if "val/loss" in record]
    assert len(held_out) == 2 and all(map(math.isfinite, held_out)) and held_out[0] != held_out[1]


def test_equal_weights_have_equal_validation_losses(settings: Settings, autoencoder: Path) -> None:
    """Noise is the images' own: without learning nothing changes; nor does a validation change what is learned."""
    fixed = [f"model.mask_vae={autoencoder}", "train.steps=4", "train.learning_rate=0", "data.val_limit=5"]
    records = log_of(train("diffusion", settings("still", *fixed, "train.validate_every=2")))
    found = [record["val/loss"] for record in records if "val/loss" in record]
    assert len(found) == 2 and found[0] == pytest.approx(found[1], rel=1e-6)
    seldom = log_of(train("diffusion", settings("seldom", *fixed, "train.validate_every=100")))
    assert [r["loss"] for r in records if "loss" in r] == [r["loss"] for r in seldom if "loss" in r]


def test_validations_beyond_their_share_are_put_off(settings: Settings) -> None:
    options = ["train.steps=6", "train.validate_every=1", "data.val_limit=1", "train.validate_share=0.000001"]
    records = log_of(train("autoencoder", settings("run", *options)))
    assert [record["step"] for record in records if "val/pq" in record] == [1, 6]
    with pytest.raises(ConfigError, match=r"train\.validate_share=0 leaves no time"):
        load_config("tiny", ["train.validate_share=0"])
    with pytest.raises(ConfigError, match=r"train\.validate_steps=2000: scheduler\.num_train_timesteps has 1000"):
        load_config("tiny", ["train.validate_steps=2000"])


def test_a_run_that_waits_for_its_data_says_so_once(settings: Settings, capfd: pytest.CaptureFixture) -> None:
    run = Run("autoencoder", settings("run"), Interrupt())
    for share in (0.9, 0.1, 0.9, 0.6, 0.9, 0.9):
        if warning := run.pace.data_warning(share):
            run.say(warning)
    run.close()
    said = capfd.readouterr().err
    assert said.count("warning: 60 % of the time") == said.count("raise data.num_workers (now 0") == 1


def test_operations_are_those_of_a_convolution_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Conv2d(3, 8, 3, padding=1, device="meta")
    assert operations._count(layer, "forward", torch.empty(1, 3, 16, 16, device="meta")) == 2 * 16 * 16 * 8 * 27
    config = load_config("tiny")
    diffusion = picture_operations("diffusion", config)
    assert diffusion > picture_operations("one_step", config) > picture_operations("autoencoder", config) > 1e8
    assert picture_operations("diffusion", load_config("tiny", ["diffusion.self_condition=1"])) > diffusion
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_operations() == 989e12
