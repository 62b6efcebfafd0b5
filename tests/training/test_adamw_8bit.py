"""AdamW with moments of a byte: what they lose, that steps are AdamW's, and that a resumed run repeats every bit."""

import json
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
from ldmseg_fast.training.adamw_8bit import BLOCK, EightBitAdamW, Moment, levels, marks
from ldmseg_fast.training.disk import disk_need
from ldmseg_fast.training.estimate import Counts, advice, state_memory
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.shards import ShardReader
from tests.training.helpers import losses

Settings = Callable[..., Config]
EIGHT = "train.optimizer=adamw_8bit"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the small parameters of the tests' model count as large ones."""
    monkeypatch.setattr(adamw_8bit, "LEAST", BLOCK)


@pytest.mark.parametrize("signed", [True, False])
def test_look_ups_find_what_a_search_finds(signed: bool):
    """At every mark, beside it, between marks, and near zero."""
    scale = marks(signed, torch.device("cpu"))
    edges = scale.marks[:-1]
    beside = [torch.nextafter(edges, torch.tensor(end)) for end in (-2.0, 2.0)]
    between = torch.linspace(-1, 1, 100_001)
    numbers = torch.cat([edges, *beside, between, between**9, torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    assert scale.below(numbers).tolist() == torch.searchsorted(edges, numbers, right=True).tolist()


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
    for _ in range(20):
        gradient, other = torch.randn_like(start) + start, torch.randn(64)
        ours.grad, theirs.grad, bias.grad, their_bias.grad = gradient.clone(), gradient, other.clone(), other
        own.step()
        peer.step()
    assert ours.grad is None and torch.equal(bias, their_bias)
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.03 * expected.norm()
    assert own.state[ours]["step"] == 20
    assert isinstance(own.state[ours]["exp_avg"], Moment) and isinstance(own.state[bias]["exp_avg"], torch.Tensor)


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


@pytest.mark.parametrize(("first", "then"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw"), ("muon", "adamw")])
def test_moments_of_another_optimizer_are_refused(settings: Settings, autoencoder: Path, small: None, first, then):
    start = [f"model.mask_vae={autoencoder}", "data.val_limit=1", "train.steps=2"]
    folder = train("diffusion", settings("run", *start, f"train.optimizer={first}", "train.max_minutes=0.000001"))
    again = settings("run", *start, f"train.optimizer={then}", "train.max_minutes=0")
    with pytest.raises(
        CheckpointError, match=rf"moments are of train\.optimizer={first} .* to {then}; go on with {first}"
    ):
        train("diffusion", again, resume=True)
    for path in folder.glob("checkpoints/step-*/state.json"):  # as it was before checkpoints told
        state = json.loads(path.read_text())
        assert state.pop("optimizer") == first
    if (first, then) == ("adamw", "adamw_8bit"):
        reader = ShardReader(next(folder.glob("checkpoints/step-*")))
        run = Run("diffusion", settings("other", *start, EIGHT), Interrupt())
        with pytest.raises(CheckpointError, match=r"not in 8 bits, .*adamw_8bit; go on with the optimizer"):
            reader.load(run.optimizer.shards, run.optimizer.averages)
        run.close()


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


@pytest.mark.parametrize("widths", ["24,48", "36,72"])
def test_forecasts_know_the_smaller_moments(settings: Settings, autoencoder: Path, small: None, widths: str):
    """Within a tenth of what an optimizer holds, also where no parameter is whole blocks of 256 numbers."""
    own = [f"model.mask_vae={autoencoder}", EIGHT, f"unet.block_out_channels={widths}", "unet.norm_groups=6"]
    config = settings("run", *own)
    run = Run("diffusion", config, Interrupt())
    held = sum(moment.nbytes for shard in run.optimizer.shards for moment in shard.moments.values())
    count = sum(shard.weight.numel() for shard in run.optimizer.shards)
    run.close()
    counts = Counts({"unet": count}, count)
    assert state_memory(counts, config, 1, 0).optimizer == pytest.approx(held, rel=0.1)
    plain = disk_need(count, count, settings("run").train).checkpoint
    assert plain - disk_need(count, count, config.train).checkpoint == pytest.approx(8 * count - held, rel=0.1)


def test_a_second_moment_follows_gradients_that_shrink():
    """Its steps are a thousandth of it, less than the levels lie apart; some weights of each block keep their size."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(64, 64))
    own = EightBitAdamW([parameter], lr=0.0, betas=(0.9, 0.99))
    size = torch.ones(64, 64)
    for step in range(900):
        if step == 200:
            size[:, ::2] = 0.05
        parameter.grad = size * torch.randn(64, 64)
        own.step()
    held, left = own.state[parameter]["exp_avg_sq"].float() / (1 - 0.99**900), 0.99**700
    assert held[:, ::2].mean() == pytest.approx(0.0025 * (1 - left) + left, rel=0.1)
    assert held[:, 1::2].mean() == pytest.approx(1.0, rel=0.05)


def test_a_step_asks_its_closure_first():
    parameter = nn.Parameter(torch.ones(64, 64))
    own = EightBitAdamW([parameter], lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert own.step(closure) == 64 * 64 and torch.allclose(parameter, torch.tensor(0.9), atol=1e-3)


def test_advice_keeps_to_what_the_optimizer_takes(settings: Settings):
    lines = "\n".join(advice("diffusion", settings("run", EIGHT), 2))
    assert "zero_stage" not in lines and "adamw_8bit" not in lines
    lines = "\n".join(advice("diffusion", settings("run", "unet.block_out_channels=208,416"), 1))
    assert "train.optimizer=adamw_8bit, in a new run: " in lines
