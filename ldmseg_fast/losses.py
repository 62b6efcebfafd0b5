"""The auto-encoder's loss: cross-entropy, and BCE + Dice per segment, on sampled points (LDMSeg, section 3.1).

Points are drawn as in PointRend (Kirillov et al. 2020, section 3.1): `oversample` times too many at random, of which
the most uncertain make `importance` of the result and new random ones the rest. Slot = id, so nothing is matched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmseg_fast.config import LossConfig
from ldmseg_fast.distributed import all_reduce_mean
from ldmseg_fast.kernels.point_loss import point_logits, sample_bce_dice, sample_ce


@dataclass(frozen=True)
class MaskLosses:
    """Scalars: `total` is the weighted sum of the others."""

    total: Tensor
    ce: Tensor
    bce: Tensor
    dice: Tensor


def _random_points(rows: int, count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    points = torch.rand(rows, count, 2, generator=generator, device=generator.device if generator else like.device)
    return points.to(like.device)  # [R, P, 2], x and y in [0, 1]


def _uncertain_points(
    uncertainty_of, rows: int, config: LossConfig, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """[R, P, 2] points; `uncertainty_of` maps points [R, P', 2] to [R, P'], larger is less certain."""
    num_important = int(config.importance * config.num_points)
    candidates = _random_points(rows, int(config.num_points * config.oversample), like, generator)
    with torch.no_grad():
        uncertainty = uncertainty_of(candidates)
    chosen = uncertainty.topk(num_important, dim=1, sorted=False).indices  # [R, P_important]
    important = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([important, _random_points(rows, config.num_points - num_important, like, generator)], dim=1)


def present_segments(segment_ids: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Image index and slot of each segment in [B, H, W] ids, void (0) left out: two int64 [M]."""
    flat = segment_ids.flatten(1).long()
    present = torch.zeros(flat.shape[0], num_slots, dtype=torch.bool, device=flat.device)
    present.scatter_(1, flat, True)
    present[:, 0] = False
    image, slot = present.nonzero(as_tuple=True)
    return image, slot


def mask_losses(
    mask_logits: Tensor, segment_ids: Tensor, config: LossConfig, generator: torch.Generator | None = None
) -> MaskLosses:
    """Loss of slot logits against a segment map.

    Args:
        mask_logits: [B, Q, h, w], any float type; may be smaller than the map (points are in [0, 1]).
        segment_ids: [B, H, W] integer, 0 = void, below Q.
        config: weights and point counts.
        generator: draws the points.

    Returns:
        CE averaged over points that are not void; BCE and Dice (+1 smoothing) averaged over segments of all ranks.
    """
    batch, num_slots = mask_logits.shape[:2]
    mask_logits = mask_logits.float()

    def margin(points: Tensor) -> Tensor:  # second logit - best logit
        best = point_logits(mask_logits, points).topk(2, dim=1).values  # [B, 2, P]
        return best[:, 1] - best[:, 0]

    ce_sum, ce_count = sample_ce(
        mask_logits, segment_ids, _uncertain_points(margin, batch, config, mask_logits, generator)
    )

    image, slot = present_segments(segment_ids, num_slots)
    planes = mask_logits[image, slot][:, None]  # [M, 1, h, w]

    def closeness(points: Tensor) -> Tensor:  # -|logit|
        return -point_logits(planes, points)[:, 0].abs()

    points = _uncertain_points(closeness, len(image), config, mask_logits, generator)
    bce_sum, dice_sum = sample_bce_dice(mask_logits, segment_ids, image, slot, points)
    num_masks = all_reduce_mean(torch.tensor(float(len(image)), device=mask_logits.device)).clamp(min=1.0)

    ce, bce, dice = ce_sum / ce_count.clamp(min=1), bce_sum / num_masks, dice_sum / num_masks
    return MaskLosses(config.ce * ce + config.bce * bce + config.dice * dice, ce, bce, dice)
