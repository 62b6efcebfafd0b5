"""The auto-encoder's loss against formulas written out on all pixels."""

import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast.config import LossConfig
from ldmseg_fast.kernels.point_loss import sample_losses
from ldmseg_fast.training import losses as losses_module
from ldmseg_fast.training.losses import (
    labelled_points,
    mask_losses,
    present_segments,
    share_num_labelled,
    share_num_masks,
)


def test_present_segments_leaves_void_out():
    ids = torch.tensor([[[0, 3], [3, 1]], [[0, 0], [0, 0]], [[2, 2], [2, 2]]], dtype=torch.uint8)
    segments = present_segments(ids, 5)
    assert list(zip(segments.image.tolist(), segments.slot.tolist())) == [(0, 1), (0, 3), (2, 2)]
    assert list(segments.counts) == [2, 0, 1]


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


def blobs(void: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [4, 24, 24], of which a share is void in each image, and logits [4, 6, 12, 12] in float64."""
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 6, (4, 6, 6), generator=numbers)
    ids[:, : int(6 * void)] = 0
    logits = torch.randn(4, 6, 12, 12, generator=numbers, dtype=torch.float64)
    return ids.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8), logits


def points_of(batch: dict) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(image) for image in batch["images"]]


def parts_of(ids: torch.Tensor, logits: torch.Tensor, size: int, config: LossConfig) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a batch that is taken `size` images at a time."""
    logits = logits.clone().requires_grad_()
    parts = [slice(at, at + size) for at in range(0, len(ids), size)]
    batches = [
        {
            "images": range(part.start, part.stop),
            "segment_ids": ids[part],
            "segment_counts": present_segments(ids[part], 6).counts,
        }
        for part in parts
    ]
    share_num_masks(batches, torch.device("cpu"))
    share_num_labelled(batches, config, points_of)
    total = 0.0
    for part, batch in zip(parts, batches):
        shared = {key: batch[key] for key in ("num_masks", "num_labelled")}
        loss = mask_losses(logits[part], ids[part], config, points_of(batch), **shared).total
        (loss / len(batches)).backward()
        total += loss.item() / len(batches)
    return total, logits.grad


def unequal_void() -> tuple[torch.Tensor, torch.Tensor]:
    """As `blobs`: an image without void, two with much of it, one with nothing else."""
    ids, logits = blobs(0.0)
    ids[1, 3:] = 0
    ids[2, :, :12] = 0
    ids[3] = 0
    return ids, logits


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_batch_add_up_to_it(size):
    """Segments and labelled points are counted over all parts; float32 in the loss leaves its last digits."""
    for config in (LossConfig(num_points=64), LossConfig(num_points=64, bce=0.0, dice=0.0)):
        for ids, logits in (blobs(0.0), blobs(0.5), unequal_void()):
            ids[0] = ids[0].clamp(max=2)  # fewer segments than in the others
            whole, parts = parts_of(ids, logits, 4, config), parts_of(ids, logits, size, config)
            assert parts[0] == pytest.approx(whole[0], rel=1e-6)
            assert torch.allclose(parts[1], whole[1], rtol=1e-5, atol=1e-9)


def test_labelled_points_are_those_of_the_loss(monkeypatch):
    counted = []

    def counting(*arguments):
        result = sample_losses(*arguments)
        counted.append(result[1])
        return result

    monkeypatch.setattr(losses_module, "sample_losses", counting)
    ids, logits = unequal_void()
    config = LossConfig(num_points=100)
    for seed in range(5):
        generators = [[torch.Generator().manual_seed(10 * seed + image) for image in range(4)] for _ in range(2)]
        mask_losses(logits, ids, config, generators[0])
        expected = labelled_points(ids, config, generators[1])
        assert expected.dtype == torch.float32 and expected == counted[-1]
        assert torch.equal(labelled_points(ids[3:], config, [torch.Generator().manual_seed(0)]), torch.tensor(0.0))


def test_uncertain_points_are_not_spent_on_void():
    """Void is nowhere certain here and the rest everywhere, yet only random points may lie in void."""
    ids = torch.zeros(1, 32, 32, dtype=torch.uint8)
    ids[:, :16] = 1
    logits = torch.zeros(1, 3, 32, 32)
    logits[:, 1, :16] = 20.0
    config = LossConfig(num_points=200, importance=1.0)
    assert labelled_points(ids, config, torch.Generator().manual_seed(0)) == 200
    found = mask_losses(logits, ids, config, torch.Generator().manual_seed(0), num_labelled=torch.tensor(200.0))
    assert torch.equal(found.ce, mask_losses(logits, ids, config, torch.Generator().manual_seed(0)).ce)


def test_points_of_an_image_do_not_depend_on_the_others():
    ids, logits = blobs(0.0)
    config = LossConfig(num_points=64, bce=0.0, dice=0.0)
    alone = [
        mask_losses(logits[i : i + 1], ids[i : i + 1], config, [torch.Generator().manual_seed(i)]) for i in range(4)
    ]
    together = mask_losses(logits, ids, config, [torch.Generator().manual_seed(image) for image in range(4)])
    assert together.ce == pytest.approx(sum(losses.ce.item() for losses in alone) / 4, rel=1e-6)
