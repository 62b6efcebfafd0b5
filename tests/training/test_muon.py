"""Muon: what it does to one matrix, to which it is applied, and that nothing passes it by."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldmseg_fast.config import Config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training import muon
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.muon import Muon, hidden_matrices, orthogonalize
from tests.training.helpers import losses

Settings = Callable[..., Config]
MUON = "train.optimizer=muon"


@pytest.mark.parametrize("shape", [(32, 32), (16, 200), (200, 16)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    matrix = 1e-3 * torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity(orthogonalize(matrix).flatten(), (left @ right).flatten(), dim=0) > 0.97
    assert not orthogonalize(torch.zeros(shape)).any()


def test_a_matrix_steps_as_pytorchs_own_muon_does(monkeypatch):
    """PyTorch's takes matrices alone, and always bfloat16; convolutions are matrices [R, C k k]."""
    monkeypatch.setattr(muon, "has_units", lambda *_: True)
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(16, 4, 3, 3)) for _ in range(2))
    flat = nn.Parameter(theirs.detach().flatten(1))
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    peer = torch.optim.Muon([flat], momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw", **settings)
    own = Muon([{"params": [ours], "orthogonal": True}], **settings)
    moments = own.state[ours]
    moments |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(ours), "exp_avg_sq": torch.zeros_like(ours)}
    for _ in range(4):
        gradient = torch.randn(16, 4, 3, 3)
        ours.grad, flat.grad = gradient.clone(), gradient.flatten(1)
        own.step()
        peer.step()
        assert (ours.flatten(1) - flat).abs().max() < 2e-3 * (flat - 1).abs().max()
    assert moments["step"] == 4 and ours.grad is None


def test_hidden_matrices_are_those_of_the_unet(settings: Settings, autoencoder: Path):
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", MUON), Interrupt())
    names = {id(p): name for name, p in run.stage.named_parameters()}
    hidden = {names[id(p)] for p in hidden_matrices(run.stage)}
    assert all(name.startswith("unet.") for name in hidden)
    assert {"unet.mid_block.resnets.0.conv1.weight", "unet.down_blocks.0.resnets.0.conv1.weight"} <= hidden
    assert not any("conv_in" in name or "conv_out" in name or name.endswith("bias") for name in hidden)
    groups = run.optimizer.adamw.param_groups
    assert {names[id(p)] for group in groups if group["orthogonal"] for p in group["params"]} == hidden
    run.close()


def test_every_hidden_matrix_is_turned_in_every_step(settings: Settings, autoencoder: Path, monkeypatch):
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", MUON), Interrupt())
    calls = []
    monkeypatch.setattr(muon, "orthogonalize", lambda matrix: calls.append(1) or orthogonalize(matrix))
    before = {name: p.clone() for name, p in run.stage.named_parameters() if p.requires_grad}
    run.take_step()
    assert len(calls) == len(list(hidden_matrices(run.stage))) > 10
    changed = [name for name, p in run.stage.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(changed) > 0.9 * len(before)
    run.close()


def test_a_skipped_step_changes_nothing(settings: Settings, autoencoder: Path):
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", MUON), Interrupt())
    run.take_step()
    before = [p.clone() for p in run.stage.parameters()]
    moments = [shard.moments["exp_avg"].clone() for shard in run.optimizer.shards]
    for parameter in run.optimizer.parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.stage.parameters(), strict=True))
    found = [shard.moments["exp_avg"] for shard in run.optimizer.shards]
    assert all(torch.equal(a, b) for a, b in zip(moments, found, strict=True))
    assert run.optimizer.counters()["adam_steps"] == 1
    run.close()


def test_a_resumed_run_repeats_every_bit(settings: Settings, autoencoder: Path):
    start = [f"model.mask_vae={autoencoder}", MUON, "train.save_every=3", "data.val_limit=1", "train.steps=6"]
    whole = losses(train("diffusion", settings("whole", *start)))
    train("diffusion", settings("cut", *start, "train.max_minutes=0.000001"))
    again = losses(train("diffusion", settings("cut", *start, "train.max_minutes=0"), resume=True))
    assert again == whole[-len(again) :] and len(whole) == 6


def test_a_stage_without_a_unet_is_refused(settings: Settings):
    with pytest.raises(ConfigError, match=r"optimizer=muon: no trained matrix of a UNet here; choose train\.optimizer"):
        Run("autoencoder", settings("run", MUON), Interrupt())
