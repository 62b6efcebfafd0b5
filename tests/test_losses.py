"""The auto-encoder's loss against formulas written out on all pixels."""

import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast.config import LossConfig
from ldmseg_fast.losses import mask_losses, present_segments


def test_present_segments_leaves_void_out():
    ids = torch.tensor([[[0, 3], [3, 1]], [[0, 0], [0, 0]], [[2, 2], [2, 2]]], dtype=torch.uint8)
    image, slot = present_segments(ids, 5)
    assert list(zip(image.tolist(), slot.tolist())) == [(0, 1), (0, 3), (2, 2)]


def perfect_logits(ids: torch.Tensor, num_slots: int) -> torch.Tensor:
    return 40.0 * F.one_hot(ids.long(), num_slots).permute(0, 3, 1, 2).float() - 20.0


def test_perfect_logits_cost_almost_nothing():
    ids = torch.zeros(2, 16, 16, dtype=torch.uint8)
    ids[:, :8], ids[:, 8:] = 1, 3
    config = LossConfig(num_points=512)
    losses = mask_losses(perfect_logits(ids, 4), ids, config, torch.Generator().manual_seed(0))
    # only points between the halves, where the target is interpolated, cost anything
    assert losses.ce < 0.1 and losses.dice < 0.2
    wrong = mask_losses(-perfect_logits(ids, 4), ids, config, torch.Generator().manual_seed(0))
    assert wrong.total > 10 * losses.total


def test_a_void_map_has_no_loss_and_finite_gradients():
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    losses = mask_losses(logits, torch.zeros(2, 8, 8, dtype=torch.uint8), LossConfig(num_points=64))
    losses.total.backward()
    assert losses.total == 0
    assert torch.isfinite(logits.grad).all()


def test_uniform_logits_cost_log_q():
    ids = torch.ones(1, 8, 8, dtype=torch.uint8)
    config = LossConfig(num_points=64, bce=0.0, dice=0.0)
    losses = mask_losses(torch.zeros(1, 8, 4, 4), ids, config)
    assert losses.total == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-5)
    assert losses.bce == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)


def test_same_generator_same_loss():
    ids = torch.randint(0, 6, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(3, 6, 10, 15, generator=torch.Generator().manual_seed(2))
    config = LossConfig(num_points=100)
    first, second = (mask_losses(logits, ids, config, torch.Generator().manual_seed(5)).total for _ in range(2))
    assert torch.equal(first, second)
