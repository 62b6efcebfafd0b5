"""The auto-encoder's loss: cross-entropy, and BCE + Dice per segment, on sampled points (LDMSeg, section 3.1).

Points are drawn as in PointRend (Kirillov et al. 2020, section 3.1): `oversample` times too many at random, of which
the most uncertain make `importance` of the result and new random ones the rest. Slot = id, so nothing is matched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.config import LossConfig
from ldmseg_fast.distributed import all_reduce_mean
from ldmseg_fast.kernels.point_loss import point_margin, sample_bce_dice, sample_ce, slot_logits

TINY = 1e-6  # a divisor where there is nothing to divide


@dataclass(frozen=True)
class MaskLosses:
    """Scalars: `total` is the weighted sum of the others."""

    total: Tensor
    ce: Tensor
    bce: Tensor
    dice: Tensor


@dataclass(frozen=True)
class Segments:
    """Segments of a batch, void left out, image after image. image, slot: int64 [M]; counts: how many in each image."""

    image: Tensor
    slot: Tensor
    counts: Sequence[int]


Generators = torch.Generator | Sequence[torch.Generator] | None  # of a batch, or one for each of its images


def _random_points(rows: Sequence[int], count: int, device: torch.device, generator: Generators) -> Tensor:
    """[R, count, 2], x and y in [0, 1]; `rows` of each image."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(
            sum(rows), count, 2, generator=generator, device=generator.device if generator else device
        ).to(device)
    points = [torch.rand(number, count, 2, generator=one, device=one.device) for number, one in zip(rows, generator)]
    return torch.cat(points).to(device)


def _uncertain_points(
    uncertainty_of: Callable[[Tensor], Tensor],
    rows: Sequence[int],
    config: LossConfig,
    device: torch.device,
    generator: Generators,
) -> Tensor:
    """[R, P, 2] points; `uncertainty_of` maps points [R, P', 2] to [R, P'], larger is less certain."""
    num_important = int(config.importance * config.num_points)
    candidates = _random_points(rows, int(config.num_points * config.oversample), device, generator)
    with torch.no_grad():
        uncertainty = uncertainty_of(candidates)
    chosen = uncertainty.topk(num_important, dim=1, sorted=False).indices  # [R, P_important]
    important = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([important, _random_points(rows, config.num_points - num_important, device, generator)], dim=1)


def present_segments(segment_ids: Tensor, num_slots: int) -> Segments:
    """The segments of [B, H, W] ids by their values; on a GPU this waits for the device."""
    flat = segment_ids.flatten(1).long()
    present = torch.zeros(flat.shape[0], num_slots, dtype=torch.bool, device=flat.device)
    present.scatter_(1, flat, True)
    present[:, 0] = False
    image, slot = present.nonzero(as_tuple=True)
    return Segments(image, slot, present.sum(1).tolist())


def share_num_masks(batches: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Put `num_masks` into the micro-batches of a step: the mean of their segment counts, over them and all ranks.

    With it as the divisor, the gradients that parts and ranks average are those of the whole batch at once.
    """
    mean = sum(sum(batch["segment_counts"]) for batch in batches) / len(batches)
    num_masks = all_reduce_mean(torch.full((), mean, device=device))  # filled there: a copy would wait for the device
    for batch in batches:
        batch["num_masks"] = num_masks


def mask_losses(
    mask_logits: Tensor,
    segment_ids: Tensor,
    config: LossConfig,
    generator: Generators = None,
    segments: Segments | None = None,
    num_masks: Tensor | None = None,
) -> MaskLosses:
    """Loss of slot logits against a segment map.

    With a generator for each image its points do not depend on the rest of the batch. Then BCE, Dice and their
    gradients are the same for any cut of a batch into ranks and micro-batches; CE is for ranks, and for micro-batches
    where their points lie in void equally often, because each divides by its own number of points that do not.

    Args:
        mask_logits: [B, Q, h, w], any float type; may be smaller than the map (points are in [0, 1]).
        segment_ids: [B, H, W] integer, 0 = void, below Q.
        config: weights and point counts.
        generator: generator of the points, or one for each image.
        segments: what `present_segments` would find.
        num_masks: divisor of BCE and Dice, from `share_num_masks`; None: the mean of this micro-batch over the ranks.

    Returns:
        CE averaged over points that are not void; BCE and Dice (+1 smoothing) averaged over segments; of all ranks.
    """
    device = mask_logits.device
    if device.type != "cuda":
        mask_logits = mask_logits.float()  # kernels take halves as they are, and add up in float32
    segments = segments or present_segments(segment_ids, mask_logits.shape[1])

    points = _uncertain_points(
        lambda points: -point_margin(mask_logits, points), [1] * len(mask_logits), config, device, generator
    )
    ce_sum, ce_count = sample_ce(mask_logits, segment_ids, points)

    image, slot = segments.image, segments.slot
    points = _uncertain_points(
        lambda points: -slot_logits(mask_logits, image, slot, points).abs(), segments.counts, config, device, generator
    )
    bce_sum, dice_sum = sample_bce_dice(mask_logits, segment_ids, image, slot, points)

    if num_masks is None:
        num_masks = all_reduce_mean(torch.full((), float(len(image)), device=device))
    ce = ce_sum / all_reduce_mean(ce_count).clamp(min=TINY)
    bce, dice = bce_sum / num_masks.clamp(min=TINY), dice_sum / num_masks.clamp(min=TINY)
    return MaskLosses(config.ce * ce + config.bce * bce + config.dice * dice, ce, bce, dice)
