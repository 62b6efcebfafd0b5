"""AdamW with moments of a byte: what they lose, that steps are AdamW's, and that a resumed run repeats every bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldmseg_fast import distributed
from ldmseg_fast.config import Config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.training import adamw_8bit
from ldmseg_fast.training.adamw_8bit import BLOCK, BYTES, EightBitAdamW, Moment, levels
from ldmseg_fast.training.disk import disk_need
from ldmseg_fast.training.estimate import Counts, state_memory
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.shards import adam_state
from tests.training.helpers import losses

Settings = Callable[..., Config]
EIGHT = "train.optimizer=adamw_8bit"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the small parameters of the tests' model count as large ones."""
    monkeypatch.setattr(adamw_8bit, "LEAST", BLOCK)


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_closest_near_zero(signed: bool):
    found = levels(signed)
    assert len(found) == 256 and (found.diff() > 0).all() and {0.0, 1.0} <= set(found.tolist())
    assert (found < 0).any() == signed
    positive = found[found > 0]
    assert positive[0] < 1e-6 and positive.diff()[-2] < 0.016


@pytest.mark.parametrize("signed", [True, False])
def test_what_a_moment_holds(signed: bool):
    """Numbers are off by a share of the largest in their block; those that a moment gave it gives again, to the bit."""
    torch.manual_seed(0)
    parameter = torch.empty(32, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    values = torch.randn(32, 16, 3, 3) * torch.logspace(-6, 0, 32).view(-1, 1, 1, 1)
    values = values if signed else values.square()
    values[3], values[4, 0, 0] = 0.0, 1e-12
    moment = Moment(parameter, signed)
    assert not moment.float().any() and moment.float().shape == parameter.shape
    moment.copy_(values)
    held = moment.float()
    largest = values.view(-1, BLOCK).abs().amax(1, keepdim=True)
    assert ((held - values).view(-1, BLOCK).abs() <= 0.02 * largest).all()
    assert not held[3].any() and (signed or torch.equal(held == 0, values == 0))
    moment.copy_(held)
    assert torch.equal(moment.float(), held)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_are_those_of_adamw(memory_format: torch.memory_format):
    torch.manual_seed(0)
    start = torch.randn(64, 32, 3, 3).contiguous(memory_format=memory_format)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bias, their_bias = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    own, peer = EightBitAdamW([ours, bias], **settings), torch.optim.AdamW([theirs, their_bias], **settings)
    adam_state(own, ours), adam_state(own, bias)
    assert isinstance(own.state[ours]["exp_avg"], Moment) and isinstance(own.state[bias]["exp_avg"], torch.Tensor)
    for _ in range(20):
        gradient, other = torch.randn_like(start) + start, torch.randn(64)
        ours.grad, theirs.grad, bias.grad, their_bias.grad = gradient.clone(), gradient, other.clone(), other
        own.step()
        peer.step()
    assert ours.grad is None and torch.equal(bias, their_bias)
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.03 * expected.norm()
    assert own.state[ours]["step"] == 20


def test_a_skipped_step_changes_nothing(settings: Settings, autoencoder: Path, small: None):
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", EIGHT), Interrupt())
    run.take_step()
    before = [p.clone() for p in run.stage.parameters()]
    moments = [shard.moments[key].float().clone() for shard in run.optimizer.shards for key in shard.moments]
    assert any(isinstance(shard.moments["exp_avg"], Moment) for shard in run.optimizer.shards)
    for parameter in run.optimizer.parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.stage.parameters(), strict=True))
    found = [shard.moments[key].float() for shard in run.optimizer.shards for key in shard.moments]
    assert all(torch.equal(a, b) for a, b in zip(moments, found, strict=True))
    assert run.optimizer.counters()["adam_steps"] == 1
    run.close()


def test_a_resumed_run_repeats_every_bit(settings: Settings, autoencoder: Path, small: None):
    start = [f"model.mask_vae={autoencoder}", EIGHT, "train.save_every=3", "data.val_limit=1", "train.steps=6"]
    whole = losses(train("diffusion", settings("whole", *start)))
    train("diffusion", settings("cut", *start, "train.max_minutes=0.000001"))
    again = losses(train("diffusion", settings("cut", *start, "train.max_minutes=0"), resume=True))
    assert again == whole[-len(again) :] and len(whole) == 6


@pytest.mark.parametrize(("first", "then"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_of_the_other_kind_are_refused(settings: Settings, autoencoder: Path, small: None, first, then):
    start = [f"model.mask_vae={autoencoder}", "data.val_limit=1", "train.steps=2"]
    train("diffusion", settings("run", *start, f"train.optimizer={first}", "train.max_minutes=0.000001"))
    with pytest.raises(CheckpointError, match=rf"moments of train\.optimizer={first}, .* go on with {first}"):
        train("diffusion", settings("run", *start, f"train.optimizer={then}", "train.max_minutes=0"), resume=True)


def test_losses_fall_as_with_adamw(settings: Settings, autoencoder: Path, small: None):
    start = [f"model.mask_vae={autoencoder}", "data.val_limit=1", "train.steps=8"]
    plain, eight = (
        losses(train("diffusion", settings(name, *start, f"train.optimizer={name}")))
        for name in ("adamw", "adamw_8bit")
    )
    assert eight == pytest.approx(plain, rel=0.02) and eight != plain


def test_zero_stages_that_cut_parameters_are_refused(settings: Settings, autoencoder: Path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "launched", lambda: True)
    config = settings("run", f"model.mask_vae={autoencoder}", EIGHT, "train.zero_stage=1")
    with pytest.raises(
        ConfigError, match=r"optimizer=adamw_8bit: train\.zero_stage=1 cuts .* choose train\.zero_stage=0"
    ):
        Run("diffusion", config, Interrupt())


def test_forecasts_know_the_smaller_moments(settings: Settings):
    plain, eight = settings("run"), settings("run", EIGHT)
    counts = Counts({"unet": 1000}, 1000)
    saved = state_memory(counts, plain, 1, 0).optimizer - state_memory(counts, eight, 1, 0).optimizer
    assert saved == (8 - BYTES) * 1000 and 2 < BYTES < 2.04
    checkpoints = [disk_need(1000, 1000, config.train).checkpoint for config in (plain, eight)]
    assert checkpoints[0] - checkpoints[1] == pytest.approx(saved, abs=1)
